// One HTTP/1.1 response as it comes: framing, and what the bodies of upstream.c carry.
//
// Each event of a stream holds its send time as @16 digits@ (CLOCK_MONOTONIC, ns). `on_event` is called for
// each; the last bytes of the body tell whether [DONE] was there, however the bytes were cut.
#ifndef RESPONSE_H
#define RESPONSE_H

#define _GNU_SOURCE
#include "common.h"
#include <stddef.h>
#include <strings.h>

enum { MAX_HEAD = 8192, TAIL = 16, STAMP_DIGITS = 16 };
enum { AT_SIZE, AT_EXTENSION, AT_DATA, AT_DATA_END, AT_TRAILER };

typedef struct {
  char head[MAX_HEAD];
  int head_length, in_body, status, chunked, close;
  int part;           // AT_*: where in a chunked body
  long left;          // bytes of the body or chunk still to come; -1: until the connection ends
  int in_stamp, digits;
  uint64_t stamp;
  char tail[TAIL];
  int tail_length;
} response;

typedef void (*event_handler)(void *owner, uint64_t stamp_ns, uint64_t now);

static inline void response_reset(response *r) {
  r->head[0] = 0;
  memset(&r->head_length, 0, sizeof *r - offsetof(response, head_length));  // not the 8 KiB of the head
}

static inline int response_done_seen(const response *r) {
  return memmem(r->tail, (size_t)r->tail_length, "[DONE]", 6) != NULL;
}

static void response_keep_tail(response *r, const char *p, long n) {
  if (n >= TAIL) {
    memcpy(r->tail, p + n - TAIL, TAIL);
    r->tail_length = TAIL;
    return;
  }
  int keep = r->tail_length + (int)n > TAIL ? TAIL - (int)n : r->tail_length;
  memmove(r->tail, r->tail + r->tail_length - keep, (size_t)keep);
  memcpy(r->tail + keep, p, (size_t)n);
  r->tail_length = keep + (int)n;
}

static void response_body(response *r, const char *p, long n, uint64_t now, event_handler on_event, void *owner) {
  response_keep_tail(r, p, n);
  for (const char *end = p + n; p < end;) {
    if (!r->in_stamp) {
      const char *at = memchr(p, '@', (size_t)(end - p));
      if (!at) return;
      r->in_stamp = 1;
      r->stamp = 0;
      r->digits = 0;
      p = at + 1;
    } else {
      char c = *p++;
      if (c >= '0' && c <= '9') {
        r->stamp = r->stamp * 10 + (uint64_t)(c - '0');
        r->digits++;
      } else {
        r->in_stamp = 0;
        if (c == '@' && r->digits == STAMP_DIGITS) on_event(owner, r->stamp, now);
      }
    }
  }
}

static const char *header_value(const char *head, const char *name) {
  const char *p = strcasestr(head, name);
  return p ? p + strlen(name) : NULL;
}

// Bytes of `p` that were the head's; the body starts after them. 0 while the head is not complete.
static int response_head(response *r, const char *p, int n) {
  int before = r->head_length, room = MAX_HEAD - 1 - before, take = n < room ? n : room;
  memcpy(r->head + before, p, (size_t)take);
  r->head_length += take;
  r->head[r->head_length] = 0;
  char *end = strstr(r->head, "\r\n\r\n");
  if (!end) return 0;
  *end = 0;
  r->status = atoi(r->head + 9);
  r->left = -1;
  const char *length = header_value(r->head, "\r\ncontent-length:");
  const char *coding = header_value(r->head, "\r\ntransfer-encoding:");
  if (length) r->left = atol(length);
  if (coding && strcasestr(coding, "chunked")) r->chunked = 1, r->left = 0;
  r->close = r->left < 0 || strcasestr(r->head, "\r\nconnection: close") != NULL;
  r->in_body = 1;
  return (int)(end + 4 - r->head) - before;
}

static int hex(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  c |= 0x20;
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

// 1 when the response is complete. Bytes after its end are ignored: nothing here is pipelined.
static int response_feed(response *r, const char *p, int n, uint64_t now, event_handler on_event, void *owner) {
  const char *end = p + n;
  if (!r->in_body) {
    int used = response_head(r, p, n);
    if (!r->in_body) return 0;
    p += used;
    if (!r->chunked && r->left == 0) return 1;
  }
  if (!r->chunked) {
    long take = end - p;
    if (r->left >= 0 && take > r->left) take = r->left;
    if (take) response_body(r, p, take, now, on_event, owner);
    if (r->left < 0) return 0;
    r->left -= take;
    return r->left == 0;
  }
  while (p < end) {
    if (r->part == AT_DATA) {
      long take = end - p < r->left ? end - p : r->left;
      response_body(r, p, take, now, on_event, owner);
      p += take;
      r->left -= take;
      if (!r->left) r->part = AT_DATA_END;
      continue;
    }
    char c = *p++;
    switch (r->part) {
      case AT_SIZE:
        if (hex(c) >= 0) {
          r->left = r->left * 16 + hex(c);
          break;
        }
        r->part = AT_EXTENSION;  // fall through: the line's end may be this very byte
      case AT_EXTENSION:
        if (c == '\n') r->part = r->left ? AT_DATA : AT_TRAILER;
        break;
      case AT_DATA_END:
        if (c == '\n') r->part = AT_SIZE, r->left = 0;
        break;
      case AT_TRAILER:  // no trailers are sent here: the first line is the empty one
        if (c == '\n') return 1;
        break;
    }
  }
  return 0;
}

#endif
