// Durations in microseconds, kept whole and sorted once at the end.
#ifndef SAMPLES_H
#define SAMPLES_H

#include "common.h"

typedef struct {
  uint32_t *us;
  size_t n, capacity;
} samples;

static inline void samples_add_ns(samples *s, uint64_t ns) {
  if (s->n == s->capacity) {
    s->capacity = s->capacity ? s->capacity * 2 : 4096;
    s->us = realloc(s->us, s->capacity * sizeof *s->us);
    if (!s->us) abort();
  }
  uint64_t us = ns / 1000;
  s->us[s->n++] = us > UINT32_MAX ? UINT32_MAX : (uint32_t)us;
}

static inline int samples_order(const void *a, const void *b) {
  uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
  return x < y ? -1 : x > y;
}

static inline uint32_t samples_at(const samples *s, double q) {
  return s->n ? s->us[(size_t)((double)(s->n - 1) * q)] : 0;
}

// ,"NAME":{"n":..,"mean":..,"p50":..,"p90":..,"p99":..,"max":..}   in microseconds
static inline void samples_print(const char *name, samples *s) {
  if (s->n) qsort(s->us, s->n, sizeof *s->us, samples_order);
  double sum = 0;
  for (size_t i = 0; i < s->n; i++) sum += s->us[i];
  printf(",\"%s\":{\"n\":%zu,\"mean\":%.1f,\"p50\":%u,\"p90\":%u,\"p99\":%u,\"max\":%u}", name, s->n,
         s->n ? sum / (double)s->n : 0, samples_at(s, .5), samples_at(s, .9), samples_at(s, .99),
         samples_at(s, 1));
}

#endif
