// loadgen: a client that costs next to nothing. One thread, epoll; a closed loop over CONNS connections, or with
// --total = --connections one request each. Prints one JSON object; all durations in it are microseconds.
//
//   loadgen --port P --connections N [options]
//     --warm S, --seconds S   the window is [warm, warm + seconds): what happens in it is counted, and the CPU
//                             time of --pids is read at its two ends
//     --total N               requests to send at most          --ramp S    spread the first ones over S seconds
//                             (where it is more than N connections send at first, the window ends with the last)
//     --stream                ask for a stream                  --grace S   wait for answers after the window
//     --pids P,P,...          whose CPU time is read            --pad N     bytes of prompt
//     --header 'K: V'         one more header (repeatable)      --model M, --path P
//     --abort-after-events N  leave each stream after N events  --abort-after-ms N   leave N ms after sending
//     --beats                 count reads per 100 ms of the window, and leave held requests at its end
#define _GNU_SOURCE
#include "response.h"
#include "samples.h"
#include <errno.h>
#include <getopt.h>
#include <signal.h>
#include <sys/epoll.h>
#include <unistd.h>

enum { MAX_PIDS = 256, MAX_REQUEST = 1 << 20, MAX_BUCKETS = 6000, BUCKET_NS = 100000000 };
enum { IDLE, CONNECTING, WAITING };
enum { FINE, NO_CONNECTION, BROKEN };

typedef struct {
  int fd, state, reused;
  size_t sent;
  long events, tag;
  uint64_t started, last_event;
  response response;
} connection;

static struct {
  int port, connections, stream, beats;
  long total, abort_events, abort_ms;
  double warm, seconds, ramp, grace;
} options = {.connections = 1, .warm = 1, .seconds = 5, .grace = 10};

static connection *connections;
static int poller, issuing = 1;
static char request[MAX_REQUEST];
static size_t request_length, tag_offset;
static long active, started, sent_tags, complete, errors, no_connection, broken, not_200, no_done, aborted, dials;
static long window_requests, window_events, window_reads, window_bytes, all_events;
static samples latency, ttft, delay, gap;
static uint64_t window_start, window_end;
static uint32_t buckets[MAX_BUCKETS];
static buffer left_log;  // "[tag,ns],"
static int sample_shown;

// --- CPU time of other processes, in nanoseconds, all their threads

static int pid_count;
static long pids[MAX_PIDS];
static double cpu_at_start[MAX_PIDS], cpu_used[MAX_PIDS];

static double cpu_seconds(long pid) {
  clockid_t clock;
  struct timespec t;
  if (clock_getcpuclockid((pid_t)pid, &clock) || clock_gettime(clock, &t)) return -1;
  return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void read_cpu(int end) {
  for (int i = 0; i < pid_count; i++) {
    double now = cpu_seconds(pids[i]);
    if (!end) cpu_at_start[i] = now;
    else cpu_used[i] = now < 0 || cpu_at_start[i] < 0 ? -1 : now - cpu_at_start[i];
  }
}

// --- one connection

static void start(connection *c, uint64_t now);

static int in_window(uint64_t t) { return t >= window_start && t < window_end; }

static void hang_up(connection *c) {
  if (c->fd >= 0) close(c->fd);
  c->fd = -1;
  c->state = IDLE;
  c->reused = 0;
}

static void show_sample(const connection *c, const char *data, int n) {
  if (sample_shown++) return;
  fprintf(stderr, "first answer that is not 200: %s\n%.*s\n", c->response.head, n > 400 ? 400 : n, data);
}

static void finished(connection *c, int error) {
  active--;
  uint64_t now = now_ns();
  if (error) {
    errors++;
    if (error == NO_CONNECTION) no_connection++;
    else broken++;
    hang_up(c);
  } else {
    if (c->response.status != 200) {
      not_200++;
      errors++;
    } else {
      complete++;
      if (options.stream && !response_done_seen(&c->response)) no_done++;
      if (in_window(now)) {
        window_requests++;
        samples_add_ns(&latency, now - c->started);
      }
    }
    if (c->response.close) hang_up(c);
    else {
      c->state = IDLE;
      c->reused = 1;
    }
  }
  if (issuing && (!options.total || started < options.total)) start(c, now);
}

static void leave(connection *c) {
  char line[64];
  uint64_t now = now_ns();
  hang_up(c);
  buffer_add(&left_log, line, (size_t)sprintf(line, "[%ld,%llu],", c->tag, (unsigned long long)now));
  aborted++;
  active--;
  if (issuing && (!options.total || started < options.total)) start(c, now);
}

static void send_request(connection *c) {
  while (c->sent < request_length) {
    if (!c->sent) {
      char digits[16];
      sprintf(digits, "%010ld", c->tag);
      memcpy(request + tag_offset, digits, 10);
    }
    ssize_t n = send(c->fd, request + c->sent, request_length - c->sent, MSG_NOSIGNAL);
    if (n < 0 && errno == EAGAIN) return;
    if (n < 0) {
      finished(c, BROKEN);
      return;
    }
    c->sent += (size_t)n;
  }
}

static void start(connection *c, uint64_t now) {
  started++;
  active++;
  c->started = now;
  c->last_event = 0;
  c->events = 0;
  c->sent = 0;
  c->tag = sent_tags++;
  response_reset(&c->response);
  if (c->fd >= 0) {
    c->state = WAITING;
    send_request(c);
    return;
  }
  struct sockaddr_in address = loopback(options.port);
  c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
  no_delay(c->fd);
  dials++;
  int pending = connect(c->fd, (void *)&address, sizeof address) < 0;
  if (pending && errno != EINPROGRESS) {
    finished(c, NO_CONNECTION);
    return;
  }
  struct epoll_event e = {.events = EPOLLIN | (pending ? EPOLLOUT : 0), .data.u32 = (uint32_t)(c - connections)};
  epoll_ctl(poller, EPOLL_CTL_ADD, c->fd, &e);
  c->state = pending ? CONNECTING : WAITING;
  if (!pending) send_request(c);
}

static void connected(connection *c) {
  int error = 0;
  socklen_t length = sizeof error;
  getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
  if (error) {
    finished(c, NO_CONNECTION);
    return;
  }
  struct epoll_event e = {.events = EPOLLIN, .data.u32 = (uint32_t)(c - connections)};
  epoll_ctl(poller, EPOLL_CTL_MOD, c->fd, &e);
  c->state = WAITING;
  send_request(c);
}

static void on_event(void *owner, uint64_t stamp, uint64_t now) {
  connection *c = owner;
  all_events++;
  if (c->events++ == 0) samples_add_ns(&ttft, now - c->started);
  if (in_window(now)) {
    window_events++;
    if (now >= stamp) samples_add_ns(&delay, now - stamp);
    if (c->last_event) samples_add_ns(&gap, now - c->last_event);
  }
  c->last_event = now;
}

static void closed_by_peer(connection *c, int clean) {
  if (c->state == IDLE) {
    hang_up(c);
  } else if (c->response.in_body && !c->response.chunked && c->response.left < 0 && clean) {
    finished(c, FINE);
  } else if (c->reused && !c->response.head_length) {  // a stale kept-alive connection: not this request's fault
    uint64_t begun = c->started;
    hang_up(c);
    started--;
    active--;
    start(c, begun);
  } else {
    finished(c, BROKEN);
  }
}

static void receive(connection *c) {
  static char data[1 << 18];
  ssize_t n = recv(c->fd, data, sizeof data, 0);
  if (n < 0 && errno == EAGAIN) return;
  if (n <= 0) {
    closed_by_peer(c, n == 0);
    return;
  }
  uint64_t now = now_ns();
  if (in_window(now)) {
    window_reads++;
    window_bytes += n;
    if (options.beats) buckets[(now - window_start) / BUCKET_NS % MAX_BUCKETS]++;
  }
  if (c->state == IDLE) return;
  int done = response_feed(&c->response, data, (int)n, now, on_event, c);
  if (c->response.in_body && c->response.status != 200) show_sample(c, data, (int)n);
  if (done) finished(c, FINE);
  else if (options.abort_events && c->events >= options.abort_events) leave(c);
}

// --- the run

static void launch(uint64_t now, uint64_t begun) {
  static int launched;
  double share = options.ramp > 0 ? (double)(now - begun) / 1e9 / options.ramp : 1;
  int wanted = share >= 1 ? options.connections : (int)(options.connections * share) + 1;
  if (wanted > options.connections) wanted = options.connections;
  while (launched < wanted && issuing && (!options.total || started < options.total))
    start(&connections[launched++], now_ns());
}

static void leave_late(uint64_t now) {
  for (int i = 0; i < options.connections; i++) {
    connection *c = &connections[i];
    if (c->state == WAITING && c->fd >= 0 && now - c->started >= (uint64_t)options.abort_ms * 1000000ull) leave(c);
  }
}

static void leave_held(void) {
  for (int i = 0; i < options.connections; i++)
    if (connections[i].state == WAITING) leave(&connections[i]);
}

static void run(void) {
  static struct epoll_event events[1024];
  uint64_t begun = now_ns();
  int opened = 0, ended = 0;
  window_start = begun + (uint64_t)(options.warm * 1e9);
  window_end = window_start + (uint64_t)(options.seconds * 1e9);
  for (;;) {
    uint64_t now = now_ns();
    if (!opened && now >= window_start) {
      opened = 1;
      read_cpu(0);
      window_start = now_ns();
    }
    int all_done = options.total > options.connections && started >= options.total && !active;
    if (!ended && opened && (now >= window_end || all_done)) {
      ended = 1;
      read_cpu(1);
      window_end = now_ns();
      issuing = 0;
      if (options.beats) leave_held();
    }
    launch(now, begun);
    if (options.abort_ms) leave_late(now);
    if (ended && (!active || now > window_end + (uint64_t)(options.grace * 1e9))) return;
    int busy = options.abort_ms || (options.ramp > 0 && now < begun + (uint64_t)(options.ramp * 1e9));
    int n = epoll_wait(poller, events, 1024, busy ? 1 : 5);
    for (int i = 0; i < n; i++) {
      connection *c = &connections[events[i].data.u32];
      if (c->fd < 0) continue;
      if (c->state == CONNECTING) connected(c);
      else receive(c);
    }
  }
}

static void print_log(const char *name, const buffer *log) {
  printf(",\"%s\":[%.*s]", name, log->length ? (int)log->length - 1 : 0, log->length ? log->data : "");
}

static void print_result(void) {
  double window = (double)(window_end - window_start) / 1e9, cpu = 0;
  struct rusage own;
  getrusage(RUSAGE_SELF, &own);
  printf("{\"window\":%.3f,\"requests\":%ld,\"complete\":%ld,\"started\":%ld,\"errors\":%ld,\"not_200\":%ld,"
         "\"no_connection\":%ld,\"broken\":%ld,\"unfinished\":%ld,\"no_done\":%ld,\"aborted\":%ld,\"dials\":%ld,"
         "\"events\":%ld,\"all_events\":%ld,\"reads\":%ld,\"bytes\":%ld",
         window, window_requests, complete, started, errors, not_200, no_connection, broken, active, no_done,
         aborted, dials, window_events, all_events, window_reads, window_bytes);
  printf(",\"cpu_by_pid\":{");
  for (int i = 0; i < pid_count; i++) {
    printf("%s\"%ld\":%.6f", i ? "," : "", pids[i], cpu_used[i]);
    if (cpu_used[i] > 0) cpu += cpu_used[i];
  }
  printf("},\"cpu\":%.6f,\"loadgen_cpu\":%.3f", cpu,
         (double)(own.ru_utime.tv_sec + own.ru_stime.tv_sec) +
             (double)(own.ru_utime.tv_usec + own.ru_stime.tv_usec) / 1e6);
  samples_print("latency", &latency);
  samples_print("ttft", &ttft);
  samples_print("delay", &delay);
  samples_print("gap", &gap);
  print_log("left", &left_log);
  if (options.beats) {
    int n = (int)((window_end - window_start) / BUCKET_NS);
    printf(",\"beats\":[");
    for (int i = 0; i < n && i < MAX_BUCKETS; i++) printf("%s%u", i ? "," : "", buckets[i]);
    printf("]");
  }
  printf("}\n");
}

static void prepare_request(const char *path, const char *model, const char *headers, int pad) {
  char *text = malloc((size_t)pad + 1), *body = malloc((size_t)pad + 1024);
  for (int i = 0; i < pad; i++) text[i] = i % 7 == 6 ? ' ' : 'a';
  text[pad] = 0;
  int n = sprintf(body,
                  "{\"model\":\"%s\",\"messages\":[{\"role\":\"system\",\"content\":\"#0000000000# You are a"
                  " helpful assistant.\"},{\"role\":\"user\",\"content\":\"%s\"}],\"temperature\":0.7,"
                  "\"max_tokens\":100,\"stream\":%s}",
                  model, text, options.stream ? "true" : "false");
  request_length = (size_t)snprintf(request, sizeof request,
                                    "POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAccept: application/json\r\n"
                                    "Content-Type: application/json\r\nUser-Agent: OpenAI/Python 1.99.0\r\n"
                                    "Authorization: Bearer sk-bench-0123456789\r\n%sContent-Length: %d\r\n\r\n%s",
                                    path, options.port, headers, n, body);
  if (request_length >= sizeof request) abort();
  tag_offset = (size_t)(strstr(request, "\"#0") + 2 - request);
  free(text);
  free(body);
}

static void read_pids(char *list) {
  for (char *p = strtok(list, ","); p && pid_count < MAX_PIDS; p = strtok(NULL, ",")) pids[pid_count++] = atol(p);
}

int main(int argc, char **argv) {
  static const struct option known[] = {
      {"port", 1, 0, 'p'},    {"connections", 1, 0, 'c'}, {"total", 1, 0, 'n'},  {"warm", 1, 0, 'w'},
      {"seconds", 1, 0, 'd'}, {"ramp", 1, 0, 'R'},        {"grace", 1, 0, 'g'},  {"stream", 0, 0, 's'},
      {"pids", 1, 0, 'P'},    {"header", 1, 0, 'H'},      {"path", 1, 0, 'u'},   {"model", 1, 0, 'm'},
      {"pad", 1, 0, 'b'},     {"abort-after-events", 1, 0, 'k'}, {"abort-after-ms", 1, 0, 'K'},
      {"beats", 0, 0, 'B'},   {0}};
  const char *path = "/v1/chat/completions", *model = "sim";
  char headers[4096] = "";
  int pad = 400, option;
  while ((option = getopt_long(argc, argv, "", known, NULL)) > 0) switch (option) {
      case 'p': options.port = atoi(optarg); break;
      case 'c': options.connections = atoi(optarg); break;
      case 'n': options.total = atol(optarg); break;
      case 'w': options.warm = atof(optarg); break;
      case 'd': options.seconds = atof(optarg); break;
      case 'R': options.ramp = atof(optarg); break;
      case 'g': options.grace = atof(optarg); break;
      case 's': options.stream = 1; break;
      case 'P': read_pids(optarg); break;
      case 'H':
        if (strlen(headers) + strlen(optarg) + 3 > sizeof headers) return 2;
        strcat(strcat(headers, optarg), "\r\n");
        break;
      case 'u': path = optarg; break;
      case 'm': model = optarg; break;
      case 'b': pad = atoi(optarg); break;
      case 'k': options.abort_events = atol(optarg); break;
      case 'K': options.abort_ms = atol(optarg); break;
      case 'B': options.beats = 1; break;
      default: return 2;
    }
  if (!options.port || pad < 0 || pad > MAX_REQUEST / 2) return 2;
  signal(SIGPIPE, SIG_IGN);
  raise_file_limit();
  prepare_request(path, model, headers, pad);
  connections = calloc((size_t)options.connections, sizeof *connections);
  for (int i = 0; i < options.connections; i++) connections[i].fd = -1;
  poller = epoll_create1(0);
  run();
  print_result();
  return 0;
}
