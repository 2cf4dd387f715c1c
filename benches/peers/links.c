/* What the links allow: every rank sends to its successor and receives from its predecessor over one bare TCP stream each, all at
 * once, and does nothing else.
 *
 *   gcc -O2 -o links links.c && ./links RANK RANKS BYTES ADDRESS_PATTERN      (10.77.0.%d: rank r listens on 10.77.0.(r+1))
 *
 * The ranks pass a byte round the ring twice, so that all start together; the time is that of the slowest rank, the median of seven
 * rounds counts. Rank 0 prints one JSON line; the payload's rate is in Mbit/s.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { PORT = 29377, PIECE = 1 << 20, ROUNDS = 7 };
static int rank, ranks, to_next, from_previous;
static long bytes;

static void die(const char *what) {
    perror(what);
    exit(1);
}

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec * 1e-9;
}

static void move(ssize_t (*call)(int, void *, size_t), int socket, char *data, long total) {
    for (long done = 0; done < total;) {
        long want = total - done < PIECE ? total - done : PIECE;
        ssize_t count = call(socket, data, want);
        if (count <= 0) die("moving bytes");
        done += count;
    }
}

static ssize_t put(int socket, void *data, size_t length) { return write(socket, data, length); }
static ssize_t get(int socket, void *data, size_t length) { return read(socket, data, length); }

static struct sockaddr_in address(const char *pattern, int of) {
    char text[64];
    struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons(PORT + of)};
    snprintf(text, sizeof text, pattern, of + 1);
    if (inet_pton(AF_INET, text, &a.sin_addr) != 1) die(text);
    return a;
}

static void join_ring(const char *pattern) {
    int listener = socket(AF_INET, SOCK_STREAM, 0), yes = 1;
    struct sockaddr_in own = address(pattern, rank), next = address(pattern, (rank + 1) % ranks);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
    if (bind(listener, (void *)&own, sizeof own) || listen(listener, 1)) die("listening");
    for (int tries = 0;; tries++) {
        to_next = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(to_next, (void *)&next, sizeof next) == 0) break;
        if (tries == 1000) die("connecting");
        close(to_next);
        usleep(10000);
    }
    from_previous = accept(listener, 0, 0);
    if (from_previous < 0) die("accepting");
    setsockopt(to_next, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

/* The slowest rank's time: the most of all goes round the ring, then round again for all to know. */
static double slowest(double seconds) {
    double most = seconds;
    for (int lap = 0; lap < 2; lap++) {
        if (rank == 0) move(put, to_next, (char *)&most, sizeof most);
        double theirs;
        move(get, from_previous, (char *)&theirs, sizeof theirs);
        most = theirs > most ? theirs : most;
        if (rank != 0) move(put, to_next, (char *)&most, sizeof most);
    }
    return most;
}

static void *send_all(void *data) {
    move(put, to_next, data, bytes);
    return 0;
}

static int ascending(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv) {
    if (argc != 5) {
        fprintf(stderr, "usage: links RANK RANKS BYTES ADDRESS_PATTERN\n");
        return 2;
    }
    rank = atoi(argv[1]), ranks = atoi(argv[2]), bytes = atol(argv[3]);
    join_ring(argv[4]);
    char *out = calloc(1, PIECE), *in = calloc(1, PIECE);
    double seconds[ROUNDS];
    for (int round = -1; round < ROUNDS; round++) {
        pthread_t sender;
        slowest(0);
        double start = now();
        if (pthread_create(&sender, 0, send_all, out)) die("starting a thread");
        move(get, from_previous, in, bytes);
        pthread_join(sender, 0);
        double most = slowest(now() - start);
        if (round >= 0) seconds[round] = most;
    }
    qsort(seconds, ROUNDS, sizeof *seconds, ascending);
    if (rank == 0)
        printf("{\"peer\":\"links\",\"bench\":\"streams\",\"ranks\":%d,\"bytes\":%ld,\"median_us\":%.1f,\"mbit_per_s\":%.1f}\n", ranks, bytes,
               seconds[ROUNDS / 2] * 1e6, bytes * 8 / seconds[ROUNDS / 2] / 1e6);
    return 0;
}
