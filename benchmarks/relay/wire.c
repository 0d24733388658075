// What stands around a relay while it is measured, and the least that a relay could be.
//
//   wire upstream PORT TICK_MS       answers as the request's body says
//   wire floor PORT UPSTREAM         passes bytes on: recv, send, and nothing else
//   wire client PORT C REQUESTS BODY [EVENTS RATE HEADERS]
//                                    C connections in a closed loop; prints one line of JSON.
//                                    EVENTS: those of a whole answer, else what BODY says. RATE:
//                                    requests that become due each second, one by one, whatever
//                                    has ended; 0 is a closed loop. HEADERS end with CRLF
//
// A body has "n": the events of the answer, sent "each" at a time on a common tick, as the steps
// of an engine are. Without events the answer is a small document. All on the loopback interface.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/timerfd.h>
#include <time.h>
#include <unistd.h>

enum { MAX_FD = 16384, SIZE = 1 << 18 };

struct peer {
    int other;          // floor: the descriptor at the other end
    int left, each;     // upstream: events to be sent
    int status, newlines, events, wanted;  // client: the answer so far
    long body;          // client: bytes of the document to come; -1: chunked, -2: still in the head
    uint64_t tail;      // client: the last bytes of a chunked body
    int64_t asked;
    size_t held;
    char data[SIZE];
};
static struct peer *peers[MAX_FD];
static int polled;

static void die(const char *what) { perror(what); exit(1); }

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void watch(int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if (fd >= MAX_FD || epoll_ctl(polled, EPOLL_CTL_ADD, fd, &event)) die("too many connections");
}

static struct peer *meet(int fd) {
    int on = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    watch(fd);
    if (!peers[fd]) peers[fd] = malloc(sizeof *peers[fd]);
    memset(peers[fd], 0, offsetof(struct peer, data));
    return peers[fd];
}

static struct sockaddr_in loopback(int port) {
    return (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port),
                                .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
}

static int connect_to(int port) {
    struct sockaddr_in to = loopback(port);
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (void *)&to, sizeof to)) die("connect");
    return fd;
}

static int listen_on(int port) {
    struct sockaddr_in at = loopback(port);
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (bind(fd, (void *)&at, sizeof at) || listen(fd, 1024)) die("listen");
    watch(fd);
    return fd;
}

static void put(int fd, const char *data, size_t size) {
    while (size) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent < 0) return;  // it has left; its next read says so
        data += sent, size -= sent;
    }
}

static long number_after(const char *text, const char *name, long otherwise) {
    const char *found = strcasestr(text, name);
    return found ? strtol(found + strlen(name), NULL, 10) : otherwise;
}

// --- upstream ------------------------------------------------------------------------------------

static void send_events(int fd, struct peer *p) {
    static char data[SIZE], event[256];
    if (!*event) {  // 200 bytes, about what vLLM writes for a token, in a chunk of their own
        int size = sprintf(event, "c8\r\ndata: {\"id\": \"chatcmpl-1\", \"text\": \"");
        memset(event + size, 'x', 4 + 200 - 4 - size);
        strcpy(event + 200, "\"}\n\n\r\n");
    }
    size_t size = 0;
    for (int sent = 0; p->left && sent < p->each; sent++, p->left--, size += 206)
        memcpy(data + size, event, 206);
    if (!p->left) memcpy(data + size, "0\r\n\r\n", 5), size += 5;
    put(fd, data, size);
}

static void upstream_reads(int fd, struct peer *p) {
    ssize_t got = recv(fd, p->data + p->held, SIZE - 1 - p->held, 0);
    if (got <= 0) { p->left = 0; close(fd); return; }
    p->data[p->held += got] = 0;
    char *body = strstr(p->data, "\r\n\r\n");
    if (!body) return;
    size_t whole = body + 4 - p->data + number_after(p->data, "content-length:", 0);
    if (p->held < whole) return;
    p->held = 0;
    p->left = number_after(body, "\"n\":", 0);
    p->each = number_after(body, "\"each\":", 1);
    static const char stream[] = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
                                 "transfer-encoding: chunked\r\n\r\n";
    static const char document[] = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                                   "content-length: 13\r\n\r\n{\"ok\": true}\n";
    p->left ? put(fd, stream, sizeof stream - 1) : put(fd, document, sizeof document - 1);
}

static void upstream_ticks(int timer) {
    uint64_t missed;
    if (read(timer, &missed, sizeof missed) < 0) return;
    for (int fd = 0; fd < MAX_FD; fd++)
        if (peers[fd] && peers[fd]->left) send_events(fd, peers[fd]);
}

// --- floor ---------------------------------------------------------------------------------------

static void pass_on(int fd, struct peer *p) {
    ssize_t got = recv(fd, p->data, SIZE, 0);
    if (got > 0) { put(p->other, p->data, got); return; }
    close(p->other);
    close(fd);
}

// --- client --------------------------------------------------------------------------------------

static char request[SIZE];
static size_t request_size;
static int to_ask, in_flight, errors, events, answers, reads;
static int64_t *took;
static int64_t each_ns, next_due;  // of a given rate
static int resting[MAX_FD], rest, wake;  // connections that wait for a request to be due, in a ring

static void ask_now(int fd, int64_t since) {
    struct peer *p = peers[fd];
    to_ask--, in_flight++;
    p->held = p->events = p->newlines = 0, p->body = -2, p->tail = 0;
    p->asked = since;
    put(fd, request, request_size);
}

static void ask_what_is_due(void) {
    static int first;
    for (; rest && to_ask && next_due <= now_ns(); next_due += each_ns, rest--) {
        ask_now(resting[first], next_due);  // late or not, its time counts from there
        first = (first + 1) % MAX_FD;
    }
    if (!rest || !to_ask) return;
    struct itimerspec at = {.it_value = {next_due / 1000000000, next_due % 1000000000}};
    timerfd_settime(wake, TFD_TIMER_ABSTIME, &at, NULL);
}

static void ask(int fd) {
    static int last;
    if (!to_ask) { close(fd); return; }
    if (!each_ns) { ask_now(fd, now_ns()); return; }
    resting[last] = fd, last = (last + 1) % MAX_FD, rest++;
    ask_what_is_due();
}

static void client_reads(int fd, struct peer *p, int wanted) {
    ssize_t got = recv(fd, p->data + p->held, SIZE - 1 - p->held, 0);
    if (got <= 0) { errors++, in_flight--; close(fd); return; }
    reads++;
    char *at = p->data + p->held, *end = at + got;
    *end = 0;
    if (p->body == -2) {
        p->held += got;
        char *head = strstr(p->data, "\r\n\r\n");
        if (!head) return;
        p->status = atoi(p->data + 9);
        at = head + 4;
        *head = 0;
        p->body = number_after(p->data, "content-length:", -1);
        p->held = 0;
    }
    for (char *c = at; c < end; c++) {  // an event ends with two line feeds
        p->tail = p->tail << 8 | (unsigned char)*c;
        if (*c == '\n') p->events += ++p->newlines == 2;
        else p->newlines = 0;
    }
    if (p->body >= 0 ? (p->body -= end - at) > 0
                     : (p->tail & 0xffffffffff) != 0x300d0a0d0a) return;  // "0", two CRLF
    took[answers++] = now_ns() - p->asked;
    errors += p->status != 200 || p->events != wanted;
    events += p->events;
    in_flight--;
    ask(fd);
}

static int by_size(const void *a, const void *b) {
    int64_t x = *(int64_t *)a, y = *(int64_t *)b;
    return (x > y) - (x < y);
}

static void client_says(int64_t began) {
    qsort(took, answers, sizeof *took, by_size);
    printf("{\"answers\": %d, \"events\": %d, \"errors\": %d, \"reads\": %d, \"p50_us\": %.1f, "
           "\"p99_us\": %.1f, \"max_us\": %.1f, \"seconds\": %.3f}\n", answers, events, errors, reads,
           answers ? took[answers / 2] / 1e3 : 0, answers ? took[answers * 99 / 100] / 1e3 : 0,
           answers ? took[answers - 1] / 1e3 : 0,
           (now_ns() - began) / 1e9);
}

// --- all -----------------------------------------------------------------------------------------

int main(int argc, char **argv) {
    if (argc < 4) { fputs("see wire.c\n", stderr); return 2; }
    enum { UPSTREAM = 'u', FLOOR = 'f', CLIENT = 'c' } role = argv[1][0];
    int port = atoi(argv[2]), listener = -1, timer = -1, wanted = 0;
    int64_t began = now_ns();
    polled = epoll_create1(0);
    if (role == CLIENT) {
        to_ask = atoi(argv[4]);
        took = malloc(sizeof *took * to_ask);
        wanted = argc > 6 ? atoi(argv[6]) : number_after(argv[5], "\"n\":", 0);
        if (argc > 7 && atof(argv[7]) > 0) {
            each_ns = 1e9 / atof(argv[7]);
            wake = timerfd_create(CLOCK_MONOTONIC, 0);
            watch(wake);
        }
        request_size = sprintf(request, "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
            "content-type: application/json\r\naccept: */*\r\nuser-agent: wire\r\n"
            "%scontent-length: %zu\r\n\r\n%s", argc > 8 ? argv[8] : "", strlen(argv[5]), argv[5]);
        next_due = now_ns() + 10000000;  // once all are connected
        for (int c = atoi(argv[3]); c; c--) {
            int fd = connect_to(port);
            meet(fd);
            ask(fd);
        }
    } else {
        listener = listen_on(port);
    }
    if (role == UPSTREAM) {
        long tick = atoi(argv[3]) * 1000000L;
        struct itimerspec every = {{0, tick}, {0, tick}};
        timer = timerfd_create(CLOCK_MONOTONIC, 0);
        timerfd_settime(timer, 0, &every, NULL);
        watch(timer);
    }
    while (role != CLIENT || in_flight || (to_ask && rest)) {
        struct epoll_event ready[256];
        int count = epoll_wait(polled, ready, 256, -1);
        for (int i = 0; i < count; i++) {
            int fd = ready[i].data.fd;
            if (fd == timer) upstream_ticks(timer);
            else if (wake && fd == wake) { read(wake, &(uint64_t){0}, 8); ask_what_is_due(); }
            else if (fd == listener) {
                int made = accept(listener, NULL, NULL);
                struct peer *p = meet(made);
                if (role == FLOOR) {
                    p->other = connect_to(atoi(argv[3]));
                    meet(p->other)->other = made;
                }
            }
            else if (role == UPSTREAM) upstream_reads(fd, peers[fd]);
            else if (role == FLOOR) pass_on(fd, peers[fd]);
            else client_reads(fd, peers[fd], wanted);
        }
    }
    client_says(began);
}
