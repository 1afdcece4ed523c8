/* The yardstick: a bare loop of sendmsg(2) on one side and recv(2) on the other, and nothing else. See README.md.
 *
 * Frozen, and the same as benches/support/bare.rs: 4 KiB an iovec, 512 KiB a call, socket buffers as the system makes
 * them, MSG_WAITALL straight into place; each channel ships a contiguous share of its own; one thread a side and channel;
 * one byte back when all has landed. Whoever changes it changes what all figures mean.
 *
 *     bare target FILE CHANNELS [populate]      says "at ADDRESS", receives, says "done syscalls=N"
 *     bare source FILE CHANNELS [populate]      says "ready", waits for "go ADDRESS", ships, says "done seconds=S ..."
 *
 * Both live on until their input ends, so that their CPU time can be read.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE ((size_t)4096)
#define CALL ((size_t)512 << 10)
#define HUGE ((uintptr_t)2 << 20)
#define CHANNELS_MAX 64

struct share {
    char *at;
    size_t bytes;
    int socket;
    long calls;
};

static pthread_barrier_t start;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

/* Mapped as QEMU maps it: shared, aligned to a huge page, and advised for huge pages. */
static char *map(const char *path, size_t *bytes, int populate)
{
    struct stat file;
    int fd = open(path, O_RDWR);
    if (fd < 0 || fstat(fd, &file))
        die(path);
    *bytes = file.st_size;
    char *reserved = mmap(NULL, *bytes + HUGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED)
        die("mmap");
    char *aligned = reserved + (-(uintptr_t)reserved & (HUGE - 1));
    char *ram = mmap(aligned, *bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (ram == MAP_FAILED)
        die("mmap");
    madvise(ram, *bytes, MADV_HUGEPAGE); /* A wish, so a refusal is no error. */
    if (populate && madvise(ram, *bytes, MADV_POPULATE_WRITE))
        die("madvise");
    return ram;
}

static void one_byte(int socket, int out)
{
    char byte = 0;
    if ((out ? send(socket, &byte, 1, MSG_NOSIGNAL) : recv(socket, &byte, 1, MSG_WAITALL)) != 1)
        die("one byte");
}

static void *send_share(void *argument)
{
    struct share *share = argument;
    pthread_barrier_wait(&start);
    for (size_t at = 0; at < share->bytes; share->calls++) {
        size_t end = share->bytes - at < CALL ? share->bytes : at + CALL;
        struct iovec iovecs[CALL / PAGE + 1];
        size_t count = 0;
        for (size_t from = at; from < end; count++) {
            size_t to = (from / PAGE + 1) * PAGE < end ? (from / PAGE + 1) * PAGE : end;
            iovecs[count] = (struct iovec){ share->at + from, to - from };
            from = to;
        }
        struct msghdr message = { .msg_iov = iovecs, .msg_iovlen = count };
        ssize_t sent = sendmsg(share->socket, &message, MSG_NOSIGNAL);
        if (sent < 0)
            die("sendmsg");
        at += sent;
    }
    one_byte(share->socket, 0);
    return NULL;
}

static void *receive_share(void *argument)
{
    struct share *share = argument;
    one_byte(share->socket, 1);
    for (size_t at = 0; at < share->bytes; share->calls++) {
        size_t left = share->bytes - at;
        ssize_t got = recv(share->socket, share->at + at, left < CALL ? left : CALL, MSG_WAITALL);
        if (got <= 0)
            die("recv");
        at += got;
    }
    one_byte(share->socket, 1);
    return NULL;
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void connect_all(struct share *shares, int channels)
{
    char line[64];
    int port;
    if (!fgets(line, sizeof line, stdin) || sscanf(line, "go 127.0.0.1:%d", &port) != 1)
        die("no command");
    struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    for (int i = 0; i < channels; i++) {
        char channel = i;
        shares[i].socket = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(shares[i].socket, (struct sockaddr *)&to, sizeof to) || send(shares[i].socket, &channel, 1, 0) != 1)
            die("connect");
    }
    for (int i = 0; i < channels; i++)
        one_byte(shares[i].socket, 0);
}

static void accept_all(struct share *shares, int channels, pthread_t *threads)
{
    struct sockaddr_in at = { .sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK) };
    socklen_t length = sizeof at;
    int listener = socket(AF_INET, SOCK_STREAM, 0);
    if (bind(listener, (struct sockaddr *)&at, length) || listen(listener, channels) ||
        getsockname(listener, (struct sockaddr *)&at, &length))
        die("listen");
    printf("at 127.0.0.1:%d\n", ntohs(at.sin_port));
    for (int i = 0; i < channels; i++) {
        unsigned char channel;
        int socket = accept(listener, NULL, NULL);
        if (socket < 0 || recv(socket, &channel, 1, MSG_WAITALL) != 1 || channel >= channels)
            die("accept");
        shares[channel].socket = socket;
        if (pthread_create(&threads[channel], NULL, receive_share, &shares[channel]))
            die("pthread_create");
    }
}

int main(int count, char **words)
{
    int channels = count > 3 ? atoi(words[3]) : 0;
    int is_source = count > 1 && !strcmp(words[1], "source");
    if (channels < 1 || channels > CHANNELS_MAX || (!is_source && strcmp(words[1], "target"))) {
        fprintf(stderr, "usage: bare source|target FILE CHANNELS [populate]\n");
        return 2;
    }
    size_t bytes;
    char *ram = map(words[2], &bytes, count > 4 && !strcmp(words[4], "populate"));
    struct share shares[CHANNELS_MAX];
    pthread_t threads[CHANNELS_MAX];
    for (int i = 0; i < channels; i++) {
        size_t each = bytes / channels / PAGE * PAGE;
        shares[i] = (struct share){ .at = ram + i * each, .bytes = i < channels - 1 ? each : bytes - i * each };
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    double begun = 0;
    if (is_source) {
        puts("ready");
        connect_all(shares, channels);
        pthread_barrier_init(&start, NULL, channels + 1);
        for (int i = 0; i < channels; i++)
            if (pthread_create(&threads[i], NULL, send_share, &shares[i]))
                die("pthread_create");
        pthread_barrier_wait(&start);
        begun = now();
    } else {
        accept_all(shares, channels, threads);
    }
    long calls = 0;
    for (int i = 0; i < channels; i++) {
        pthread_join(threads[i], NULL);
        calls += shares[i].calls;
    }
    if (is_source)
        printf("done seconds=%.6f syscalls=%ld\n", now() - begun, calls);
    else
        printf("done syscalls=%ld\n", calls);
    while (getchar() != EOF)
        ;
    return 0;
}
