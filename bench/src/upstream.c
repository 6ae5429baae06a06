// upstream: replicas that cost next to nothing. One thread, epoll, several ports.
//
//   upstream PORT [PORT...]
//
// POST /v1/chat/completions, /v1/completions, /generate
//     "stream":true in the body: text/event-stream, one HTTP chunk and one write per event, each carrying its
//     send time (response.h); otherwise one JSON answer. A `#DIGITS#` in the body is the request's tag.
// GET /health, /v1/models, /v1/loads, /server_info, /metrics   what the gateways measured here ask for
// GET /sim/set?n=100&interval=0&delay=0&health=200&limit=4096
//     events per stream, us between them, us before the first byte, status of /health, max_running_requests
// GET /sim/stats | /sim/reset | /sim/closed    counters per port; [[tag, ns], ...] of requests closed on us
#define _GNU_SOURCE
#include "common.h"
#include <errno.h>
#include <signal.h>
#include <strings.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { MAX_PORTS = 32, MAX_FILES = 65536, WHEEL = 131072 /* buckets of 1 ms */ };
enum { READING, DELAYED, STREAMING };

typedef struct connection {
  int fd, port, state, stream, event, wants_out;
  long left, tag;
  buffer in, out;
  uint64_t due_us;
  struct connection *next, *previous, **list;
} connection;

static connection *connections[MAX_FILES];
static connection *wheel[WHEEL];  // by due time
static connection *eager;         // streams without an interval: an event whenever the socket takes it
static int timers, eagers, poller;
static uint64_t tick_ms;

static struct {
  int port, listener;
  long requests, active, most_active, closed, events, connections, aborts;
} ports[MAX_PORTS];
static int port_count;

static long events_per_stream = 100, interval_us = 0, delay_us = 0, health = 200, running_limit = 4096;
static char answer[4096];
static int answer_length;
static buffer closed_log;  // "[tag,ns],"

// --- lists

static void unlist(connection *c) {
  if (!c->list) return;
  if (c->previous) c->previous->next = c->next;
  else *c->list = c->next;
  if (c->next) c->next->previous = c->previous;
  if (c->list == &eager) eagers--;
  else timers--;
  c->list = NULL;
  c->next = c->previous = NULL;
}

static void enlist(connection **list, connection *c) {
  c->list = list;
  c->previous = NULL;
  c->next = *list;
  if (*list) (*list)->previous = c;
  *list = c;
  if (list == &eager) eagers++;
  else timers++;
}

static void call_at(connection *c, uint64_t due_us) {
  uint64_t ms = due_us / 1000;
  c->due_us = due_us;
  if (ms <= tick_ms) ms = tick_ms + 1;
  enlist(&wheel[ms % WHEEL], c);
}

// --- connections

static void drop(connection *c) {
  if (c->state != READING) {
    char line[64];
    ports[c->port].closed++;
    ports[c->port].active--;
    buffer_add(&closed_log, line, (size_t)sprintf(line, "[%ld,%llu],", c->tag, (unsigned long long)now_ns()));
  }
  unlist(c);
  close(c->fd);
  connections[c->fd] = NULL;
  free(c->in.data);
  free(c->out.data);
  free(c);
}

static void want_out(connection *c, int wanted) {
  if (c->wants_out == wanted) return;
  c->wants_out = wanted;
  struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP | (wanted ? EPOLLOUT : 0), .data.fd = c->fd};
  epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
}

// -1: the connection is dead and dropped.
static int put(connection *c, const char *data, int n) {
  ssize_t sent = 0;
  if (c->out.length == c->out.offset) {
    c->out.length = c->out.offset = 0;
    sent = send(c->fd, data, (size_t)n, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) {
      drop(c);
      return -1;
    }
    if (sent < 0) sent = 0;
    if (sent == n) return 0;
  }
  buffer_add(&c->out, data + sent, (size_t)(n - sent));
  want_out(c, 1);
  return 0;
}

static int flush(connection *c) {
  while (c->out.offset < c->out.length) {
    ssize_t sent = send(c->fd, c->out.data + c->out.offset, c->out.length - c->out.offset, MSG_NOSIGNAL);
    if (sent < 0 && errno == EAGAIN) return 0;
    if (sent < 0) {
      drop(c);
      return -1;
    }
    c->out.offset += (size_t)sent;
  }
  c->out.length = c->out.offset = 0;
  want_out(c, 0);
  return 0;
}

// --- answers

static void finish(connection *c) {
  c->state = READING;
  ports[c->port].active--;
}

static int send_answer(connection *c) {
  finish(c);
  return put(c, answer, answer_length);
}

static const char STREAM_HEAD[] =
    "HTTP/1.1 200 OK\r\ndate: Tue, 24 Nov 2026 04:05:06 GMT\r\nserver: uvicorn\r\n"
    "content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
static const char STREAM_END[] = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";

// -1: dead, 1: that was the last, 0: more to come.
static int send_event(connection *c) {
  char out[2048], event[1024];
  int n = 0, last = c->left == 1;
  if (c->event == 0) n = sprintf(out, "%s", STREAM_HEAD);
  int length = sprintf(event,
                       "data: {\"id\":\"chatcmpl-7f3b1e5a9c\",\"object\":\"chat.completion.chunk\",\"created\":"
                       "1795500000,\"model\":\"sim\",\"choices\":[{\"index\":0,\"delta\":{%s\"content\":\"@%016llu@\""
                       "},\"logprobs\":null,\"finish_reason\":%s}]}\n\n",
                       c->event == 0 ? "\"role\":\"assistant\"," : "", (unsigned long long)now_ns(),
                       last ? "\"stop\"" : "null");
  n += sprintf(out + n, "%x\r\n%s\r\n", length, event);
  c->event++;
  c->left--;
  ports[c->port].events++;
  if (last) {
    finish(c);
    n += sprintf(out + n, "%s", STREAM_END);
  }
  return put(c, out, n) < 0 ? -1 : last;
}

static void begin(connection *c) {
  if (!c->stream) {
    send_answer(c);
    return;
  }
  c->state = STREAMING;
  c->event = 0;
  c->left = events_per_stream;
  uint64_t us = now_ns() / 1000;
  if (send_event(c)) return;
  if (interval_us) call_at(c, us + (uint64_t)interval_us);
  else enlist(&eager, c);
}

static int reply(connection *c, long status, const char *type, const char *body, size_t n) {
  buffer out = {0};
  char head[256];
  buffer_add(&out, head, (size_t)sprintf(head, "HTTP/1.1 %ld %s\r\nserver: uvicorn\r\ncontent-length: %zu\r\n"
                                               "content-type: %s\r\n\r\n",
                                         status, status == 200 ? "OK" : "Error", n, type));
  buffer_add(&out, body, n);
  int result = put(c, out.data, (int)out.length);
  free(out.data);
  return result;
}

static int reply_json(connection *c, const char *body) {
  return reply(c, 200, "application/json", body, strlen(body));
}

// --- requests

static void set_from(const char *query, const char *name, long *value) {
  const char *p = strstr(query, name);
  if (p) *value = atol(p + strlen(name));
}

static int stats(connection *c) {
  char out[8192];
  int n = sprintf(out, "[");
  for (int i = 0; i < port_count; i++)
    n += sprintf(out + n,
                 "%s{\"port\":%d,\"requests\":%ld,\"active\":%ld,\"most_active\":%ld,\"closed\":%ld,\"events\":%ld,"
                 "\"connections\":%ld,\"aborts\":%ld}",
                 i ? "," : "", ports[i].port, ports[i].requests, ports[i].active, ports[i].most_active,
                 ports[i].closed, ports[i].events, ports[i].connections, ports[i].aborts);
  sprintf(out + n, "]");
  return reply_json(c, out);
}

static int closed(connection *c) {
  buffer out = {0};
  buffer_add(&out, "[", 1);
  if (closed_log.length) buffer_add(&out, closed_log.data, closed_log.length - 1);
  buffer_add(&out, "]", 1);
  int result = reply(c, 200, "application/json", out.data, out.length);
  free(out.data);
  return result;
}

static int other(connection *c, const char *path) {
  char out[1024];
  if (!strncmp(path, "/health", 7) || !strcmp(path, "/")) return reply(c, health, "text/plain", "", 0);
  if (!strncmp(path, "/sim/stats", 10)) return stats(c);
  if (!strncmp(path, "/sim/closed", 11)) return closed(c);
  if (!strncmp(path, "/sim/set", 8)) {
    set_from(path, "n=", &events_per_stream);
    set_from(path, "interval=", &interval_us);
    set_from(path, "delay=", &delay_us);
    set_from(path, "health=", &health);
    set_from(path, "limit=", &running_limit);
    return reply(c, 200, "text/plain", "", 0);
  }
  if (!strncmp(path, "/sim/reset", 10)) {
    closed_log.length = 0;
    for (int i = 0; i < port_count; i++) {
      ports[i].requests = ports[i].closed = ports[i].events = ports[i].connections = ports[i].aborts = 0;
      ports[i].most_active = ports[i].active;
    }
    return reply(c, 200, "text/plain", "", 0);
  }
  if (!strncmp(path, "/abort_request", 14)) {
    ports[c->port].aborts++;
    return reply(c, 200, "text/plain", "", 0);
  }
  if (!strncmp(path, "/v1/loads", 9)) {
    sprintf(out, "{\"loads\":[{\"dp_rank\":0,\"timestamp\":%.3f,\"num_running_reqs\":%ld,\"num_waiting_reqs\":0,"
                 "\"max_running_requests\":%ld}]}",
            (double)now_ns() / 1e9, ports[c->port].active, running_limit);
    return reply_json(c, out);
  }
  if (!strncmp(path, "/v1/models", 10))
    return reply_json(c, "{\"object\":\"list\",\"data\":[{\"id\":\"sim\",\"object\":\"model\",\"created\":1795500000,"
                         "\"owned_by\":\"sglang\",\"root\":\"sim\",\"max_model_len\":32768}]}");
  if (!strncmp(path, "/metrics", 8)) {
    int n = sprintf(out, "# TYPE sglang:num_running_reqs gauge\nsglang:num_running_reqs{model_name=\"sim\"} %ld\n"
                         "# TYPE sglang:num_queue_reqs gauge\nsglang:num_queue_reqs{model_name=\"sim\"} 0\n",
                    ports[c->port].active);
    return reply(c, 200, "text/plain; version=0.0.4", out, (size_t)n);
  }
  if (strstr(path, "info")) {  // /server_info, /get_model_info and their like
    sprintf(out, "{\"model_path\":\"sim\",\"served_model_name\":\"sim\",\"tokenizer_path\":\"sim\",\"is_generation\":"
                 "true,\"dp_size\":1,\"tp_size\":1,\"max_running_requests\":%ld,\"version\":\"0.5.23\"}",
            running_limit);
    return reply_json(c, out);
  }
  return reply(c, 404, "application/json", "{\"detail\":\"Not Found\"}", 22);
}

static int generates(const char *path) {
  return !strncmp(path, "/v1/chat/completions", 20) || !strncmp(path, "/v1/completions", 15) ||
         !strncmp(path, "/generate", 9);
}

static int asks_for_stream(const char *body, size_t n) {
  const char *p = memmem(body, n, "\"stream\"", 8);
  if (!p) return 0;
  for (p += 8; *p == ' ' || *p == ':';) p++;
  return !strncmp(p, "true", 4);
}

static long tag_of(const char *body, size_t n) {
  const char *p = memchr(body, '#', n);
  return p ? atol(p + 1) : -1;
}

// Length of the first complete request in `in`; 0: not all of it is here. `head` gets the head's length.
static size_t complete_request(const buffer *in, size_t *head) {
  const char *end = memmem(in->data, in->length, "\r\n\r\n", 4);
  if (!end) return 0;
  *head = (size_t)(end - in->data) + 4;
  size_t length = 0;
  for (const char *p = memchr(in->data, '\n', *head); p && p < end; p = memchr(p + 1, '\n', (size_t)(end - p))) {
    if (!strncasecmp(p + 1, "content-length:", 15)) length = strtoul(p + 16, NULL, 10);
    if (!strncasecmp(p + 1, "transfer-encoding:", 18)) {
      const char *last = memmem(end, in->length - (size_t)(end - in->data), "0\r\n\r\n", 5);
      return last ? (size_t)(last - in->data) + 5 : 0;
    }
  }
  return in->length >= *head + length ? *head + length : 0;
}

static void serve(connection *c) {
  size_t head, total;
  while (c->state == READING && c->in.length && (total = complete_request(&c->in, &head))) {
    char path[256];
    const char *p = memchr(c->in.data, ' ', head);
    size_t n = 0;
    if (!p) {
      drop(c);
      return;
    }
    for (p++; n < sizeof path - 1 && *p != ' ' && *p != '\r';) path[n++] = *p++;
    path[n] = 0;
    int post = c->in.data[0] == 'P', stream = asks_for_stream(c->in.data + head, total - head);
    long tag = tag_of(c->in.data + head, total - head);
    memmove(c->in.data, c->in.data + total, c->in.length - total);
    c->in.length -= total;
    c->in.data[c->in.length] = 0;
    if (post && generates(path)) {
      int fd = c->fd;
      ports[c->port].requests++;
      if (++ports[c->port].active > ports[c->port].most_active) ports[c->port].most_active = ports[c->port].active;
      c->stream = stream;
      c->tag = tag;
      c->state = DELAYED;
      if (delay_us) call_at(c, now_ns() / 1000 + (uint64_t)delay_us);
      else begin(c);
      if (connections[fd] != c) return;
    } else if (other(c, path) < 0) {
      return;
    }
  }
}

static void receive(connection *c, uint32_t flags) {
  for (;;) {
    buffer_reserve(&c->in, 4097);
    size_t room = c->in.capacity - c->in.length - 1;
    ssize_t n = recv(c->fd, c->in.data + c->in.length, room, 0);
    if (n == 0 || (n < 0 && errno != EAGAIN)) {
      drop(c);
      return;
    }
    if (n < 0) break;
    c->in.length += (size_t)n;
    c->in.data[c->in.length] = 0;
    if ((size_t)n < room) break;
  }
  if (flags & EPOLLRDHUP) drop(c);
  else serve(c);
}

static void accept_all(int port) {
  int fd;
  while ((fd = accept4(ports[port].listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
    if (fd >= MAX_FILES) {
      close(fd);
      continue;
    }
    no_delay(fd);
    connection *c = calloc(1, sizeof *c);
    c->fd = fd;
    c->port = port;
    connections[fd] = c;
    ports[port].connections++;
    struct epoll_event e = {.events = EPOLLIN | EPOLLRDHUP, .data.fd = fd};
    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
  }
}

static void run_timers(void) {
  for (uint64_t now_ms = now_ns() / 1000000; tick_ms < now_ms;) {
    tick_ms++;
    connection *c = wheel[tick_ms % WHEEL], *next;
    for (; c; c = next) {
      next = c->next;
      if (c->due_us / 1000 > tick_ms) continue;  // a later turn of the wheel
      uint64_t due_us = c->due_us;
      int fd = c->fd;
      unlist(c);
      if (c->state == DELAYED) begin(c);
      else if (send_event(c) == 0) call_at(c, due_us + (uint64_t)interval_us);
      if (connections[fd] == c && c->state == READING && c->in.length) serve(c);
    }
  }
}

static void run_eager(void) {
  connection *next;
  for (connection *c = eager; c; c = next) {
    int fd = c->fd;
    next = c->next;
    if (c->out.length != c->out.offset) continue;
    if (send_event(c) != 1) continue;
    unlist(c);
    if (connections[fd] == c && c->in.length) serve(c);
  }
}

static void prepare_answer(void) {
  char text[361], body[2048];
  memset(text, 'x', sizeof text - 1);
  text[sizeof text - 1] = 0;
  int n = sprintf(body,
                  "{\"id\":\"chatcmpl-7f3b1e5a9c\",\"object\":\"chat.completion\",\"created\":1795500000,\"model\":"
                  "\"sim\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\",\"content\":\"%s\","
                  "\"reasoning_content\":null,\"tool_calls\":null},\"logprobs\":null,\"finish_reason\":\"stop\","
                  "\"matched_stop\":null}],\"usage\":{\"prompt_tokens\":24,\"total_tokens\":124,"
                  "\"completion_tokens\":100,\"prompt_tokens_details\":null}}",
                  text);
  answer_length = sprintf(answer,
                          "HTTP/1.1 200 OK\r\ndate: Tue, 24 Nov 2026 04:05:06 GMT\r\nserver: uvicorn\r\n"
                          "content-length: %d\r\ncontent-type: application/json\r\n\r\n%s",
                          n, body);
}

int main(int argc, char **argv) {
  signal(SIGPIPE, SIG_IGN);
  raise_file_limit();
  prepare_answer();
  poller = epoll_create1(0);
  for (int i = 1; i < argc && port_count < MAX_PORTS; i++) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1, port = atoi(argv[i]);
    struct sockaddr_in address = loopback(port);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (void *)&address, sizeof address) || listen(fd, 4096)) {
      perror(argv[i]);
      return 1;
    }
    struct epoll_event e = {.events = EPOLLIN, .data.fd = -1 - port_count};
    epoll_ctl(poller, EPOLL_CTL_ADD, fd, &e);
    ports[port_count].listener = fd;
    ports[port_count++].port = port;
  }
  if (!port_count) {
    fprintf(stderr, "usage: upstream PORT [PORT...]\n");
    return 2;
  }
  tick_ms = now_ns() / 1000000;
  struct epoll_event events[512];
  for (;;) {
    int n = epoll_wait(poller, events, 512, eagers ? 0 : timers ? 1 : 1000);
    for (int i = 0; i < n; i++) {
      int fd = events[i].data.fd;
      if (fd < 0) {
        accept_all(-1 - fd);
        continue;
      }
      connection *c = connections[fd];
      if (!c) continue;
      if (events[i].events & (EPOLLERR | EPOLLHUP)) {
        drop(c);
        continue;
      }
      if (events[i].events & EPOLLOUT && flush(c) < 0) continue;
      if (events[i].events & (EPOLLIN | EPOLLRDHUP)) receive(c, events[i].events);
    }
    run_timers();
    run_eager();
  }
}
