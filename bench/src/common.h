// What both programs need: the clock, the file limit, a buffer that grows.
#ifndef COMMON_H
#define COMMON_H

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>

// CLOCK_MONOTONIC: one clock for all processes of the machine, so a stamp made by one can be read by another.
static inline uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000ull + (uint64_t)t.tv_nsec;
}

static inline void raise_file_limit(void) {
  struct rlimit limit;
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

static inline void no_delay(int fd) {
  int one = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}

static inline struct sockaddr_in loopback(int port) {
  struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  return address;
}

// Bytes that grow; `length` are used, `offset` of them already consumed.
typedef struct {
  char *data;
  size_t length, offset, capacity;
} buffer;

static inline void buffer_reserve(buffer *b, size_t more) {
  if (b->length + more <= b->capacity) return;
  if (b->offset) {
    memmove(b->data, b->data + b->offset, b->length - b->offset);
    b->length -= b->offset;
    b->offset = 0;
  }
  if (b->length + more <= b->capacity) return;
  b->capacity = (b->length + more) * 2;
  b->data = realloc(b->data, b->capacity);
  if (!b->data) abort();
}

static inline void buffer_add(buffer *b, const void *data, size_t n) {
  buffer_reserve(b, n);
  memcpy(b->data + b->length, data, n);
  b->length += n;
}

#endif
