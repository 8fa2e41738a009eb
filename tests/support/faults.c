/* A disk, a clock and a machine that fail on purpose: loaded with LD_PRELOAD, told what to do by the environment.
 *
 * Calls of libc that change files at or below a folder are numbered from 1, in all threads together. The library reads
 * its variables when a process starts, and again when `fault_arm` is called (in a process that was forked):
 *
 *   FAULT_BELOW    the folder; without it no call counts
 *   FAULT_CALLS    which kinds of calls count, by name, with commas between: open (to write), write, sync, rename, link,
 *                  mkdir, unlink, lock, read; without it all but lock and read
 *   FAULT_AT       the number of the call that fails; 0 or none only counts
 *   FAULT_HOW      error: it fails with FAULT_ERRNO, once
 *                  full: it and all that follow, but those that delete; a write takes half of its bytes first
 *                  kill: the process is killed before the call
 *                  vanish: the folder is renamed to FOLDER.gone before the call
 *   FAULT_LOG      a file that gets a line for each call that counts: its number, kind and path
 *   FAULT_CLOCK    "EVERY:SECONDS,SECONDS": the wall clock is off by the first number at first, by the next one
 *                  after so many questions, and so on, in turn
 *   FAULT_THREADS  how many threads can be started from now on
 *   FAULT_FORKS    how many processes can be started from now on
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum kind { OPEN, WRITE, SYNC, RENAME, LINK, MKDIR, UNLINK, LOCK, READ, KINDS };
static const char *names[KINDS] = {"open", "write", "sync", "rename", "link", "mkdir", "unlink", "lock", "read"};
enum how { ERROR, FULL, KILL, VANISH };

static char below[PATH_MAX];
static size_t length;
static int counted[KINDS], how, number, log_file = -1, moves, every, offsets[16], threads = -1, forks = -1;
static long at, calls, questions;

/* The function that this library stands before. */
#define REAL(type, name, ...)                                \
    static type (*real)(__VA_ARGS__);                        \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static int number_of(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text && *text ? atoi(text) : otherwise;
}

static int lists(const char *text, const char *name) {
    for (size_t size = strlen(name); text; text = strchr(text, ',') ? strchr(text, ',') + 1 : NULL)
        if (!strncmp(text, name, size) && (!text[size] || text[size] == ',')) return 1;
    return 0;
}

void fault_arm(void) {
    const char *text = getenv("FAULT_BELOW");
    length = 0;
    calls = questions = 0;
    at = number_of("FAULT_AT", 0);
    number = number_of("FAULT_ERRNO", EIO);
    threads = number_of("FAULT_THREADS", -1);
    forks = number_of("FAULT_FORKS", -1);
    const char *wanted = getenv("FAULT_CALLS");
    for (int kind = 0; kind < KINDS; kind++)
        counted[kind] = wanted && *wanted ? lists(wanted, names[kind]) : kind != LOCK && kind != READ;
    const char *ways[] = {"error", "full", "kill", "vanish"}, *way = getenv("FAULT_HOW");
    how = ERROR;
    for (int i = 0; way && i < 4; i++)
        if (!strcmp(way, ways[i])) how = i;
    if (log_file >= 0) syscall(SYS_close, log_file);
    const char *log = getenv("FAULT_LOG");
    log_file = log && *log ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    moves = 0;
    const char *clock = getenv("FAULT_CLOCK");
    if (clock && *clock) {
        char *rest;
        for (every = strtol(clock, &rest, 10); *rest && moves < 16;) offsets[moves++] = strtol(rest + 1, &rest, 10);
    }
    if (text && *text && strlen(text) < sizeof below) {
        strcpy(below, text);
        length = strlen(text);
    }
}

__attribute__((constructor)) static void start(void) { fault_arm(); }

static int is_below(const char *path) {
    return length && !strncmp(path, below, length) && (!path[length] || path[length] == '/');
}

/* What an open descriptor is a file of. */
static int descriptor_below(int descriptor, char *path) {
    if (!length) return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t got = syscall(SYS_readlinkat, AT_FDCWD, link, path, PATH_MAX - 1);
    if (got <= 0) return 0;
    path[got] = 0;
    return is_below(path);
}

static int path_below(int folder, const char *name, char *path) {
    if (!length || !name) return 0;
    if (name[0] == '/') {
        snprintf(path, PATH_MAX, "%s", name);
        return is_below(path);
    }
    char base[PATH_MAX];
    if (folder == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        char link[64];
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        ssize_t got = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1);
        if (got <= 0) return 0;
        base[got] = 0;
    }
    if (snprintf(path, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) return 0;
    return is_below(path);
}

enum verdict { GO, FAIL, HALF };

static void die(void) {
    syscall(SYS_kill, syscall(SYS_getpid), SIGKILL);
    for (;;) syscall(SYS_pause);
}

static enum verdict judge(enum kind kind, const char *path) {
    if (!counted[kind]) return GO;
    long call = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (log_file >= 0) {
        char line[PATH_MAX + 64];
        int size = snprintf(line, sizeof line, "%ld %s %s\n", call, names[kind], path);
        syscall(SYS_write, log_file, line, size);
    }
    if (!at || call < at) return GO;
    if (how == FULL && kind != UNLINK) return call == at && kind == WRITE ? HALF : FAIL;
    if (call != at) return GO;
    char gone[PATH_MAX + 8];
    switch (how) {
    case ERROR:
        return FAIL;
    case KILL:
        die();
        return FAIL;
    case VANISH:
        snprintf(gone, sizeof gone, "%s.gone", below);
        syscall(SYS_renameat2, AT_FDCWD, below, AT_FDCWD, gone, 0);
    }
    return GO;
}

/* Does the call `real_call` unless it is to fail. */
#define DECIDE(is_ours, kind, real_call)                                          \
    char path[PATH_MAX];                                                          \
    enum verdict verdict = (is_ours) ? judge(kind, path) : GO;                    \
    if (verdict == FAIL || verdict == HALF) {                                     \
        errno = number;                                                           \
        return -1;                                                                \
    }                                                                             \
    return real_call

#define OPENING(name)                                                                              \
    int name(const char *file, int flags, ...) {                                                   \
        REAL(int, #name, const char *, int, ...);                                                  \
        mode_t mode = 0;                                                                           \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                       \
            va_list more;                                                                          \
            va_start(more, flags);                                                                 \
            mode = va_arg(more, mode_t);                                                           \
            va_end(more);                                                                          \
        }                                                                                          \
        int writes = flags & (O_WRONLY | O_RDWR | O_CREAT);                                        \
        DECIDE(path_below(AT_FDCWD, file, path), writes ? OPEN : READ, real(file, flags, mode));   \
    }
OPENING(open)
OPENING(open64)

#define OPENING_AT(name)                                                                           \
    int name(int folder, const char *file, int flags, ...) {                                       \
        REAL(int, #name, int, const char *, int, ...);                                             \
        mode_t mode = 0;                                                                           \
        if (flags & (O_CREAT | O_TMPFILE)) {                                                       \
            va_list more;                                                                          \
            va_start(more, flags);                                                                 \
            mode = va_arg(more, mode_t);                                                           \
            va_end(more);                                                                          \
        }                                                                                          \
        int writes = flags & (O_WRONLY | O_RDWR | O_CREAT);                                        \
        DECIDE(path_below(folder, file, path), writes ? OPEN : READ, real(folder, file, flags, mode)); \
    }
OPENING_AT(openat)
OPENING_AT(openat64)

#define STREAM(name)                                                               \
    FILE *name(const char *file, const char *mode) {                               \
        REAL(FILE *, #name, const char *, const char *);                           \
        char path[PATH_MAX];                                                       \
        int ours = path_below(AT_FDCWD, file, path);                               \
        enum verdict verdict = ours ? judge(strpbrk(mode, "wa+") ? OPEN : READ, path) : GO; \
        if (verdict == FAIL || verdict == HALF) {                                  \
            errno = number;                                                        \
            return NULL;                                                           \
        }                                                                          \
        return real(file, mode);                                                   \
    }
STREAM(fopen)
STREAM(fopen64)

#define WRITING(type, name, parameters, arguments, half, ...)                     \
    type name parameters {                                                        \
        REAL(type, #name, __VA_ARGS__);                                           \
        char path[PATH_MAX];                                                      \
        enum verdict verdict = descriptor_below(descriptor, path) ? judge(WRITE, path) : GO; \
        if (verdict == HALF && (half) > 0) size = half;                           \
        else if (verdict == FAIL || verdict == HALF) {                            \
            errno = number;                                                       \
            return -1;                                                            \
        }                                                                         \
        return real arguments;                                                    \
    }
WRITING(ssize_t, write, (int descriptor, const void *data, size_t size), (descriptor, data, size), size / 2,
        int, const void *, size_t)
WRITING(ssize_t, pwrite, (int descriptor, const void *data, size_t size, off_t start), (descriptor, data, size, start),
        size / 2, int, const void *, size_t, off_t)
WRITING(ssize_t, pwrite64, (int descriptor, const void *data, size_t size, off64_t start),
        (descriptor, data, size, start), size / 2, int, const void *, size_t, off64_t)
WRITING(ssize_t, writev, (int descriptor, const struct iovec *data, int size), (descriptor, data, size), size / 2,
        int, const struct iovec *, int)
WRITING(ssize_t, sendfile, (int descriptor, int from, off_t *start, size_t size), (descriptor, from, start, size),
        size / 2, int, int, off_t *, size_t)
WRITING(ssize_t, sendfile64, (int descriptor, int from, off64_t *start, size_t size), (descriptor, from, start, size),
        size / 2, int, int, off64_t *, size_t)
WRITING(ssize_t, copy_file_range,
        (int from, off64_t *start, int descriptor, off64_t *to, size_t size, unsigned flags),
        (from, start, descriptor, to, size, flags), size / 2, int, off64_t *, int, off64_t *, size_t, unsigned)
WRITING(int, ftruncate, (int descriptor, off_t size), (descriptor, size), 0, int, off_t)
WRITING(int, ftruncate64, (int descriptor, off64_t size), (descriptor, size), 0, int, off64_t)

/* Streams write inside libc, where no call can be taken; so a stream's write fails here. */
size_t fwrite(const void *data, size_t size, size_t count, FILE *stream) {
    REAL(size_t, "fwrite", const void *, size_t, size_t, FILE *);
    char path[PATH_MAX];
    enum verdict verdict = descriptor_below(fileno(stream), path) ? judge(WRITE, path) : GO;
    if (verdict == FAIL || verdict == HALF) {
        errno = number;
        return 0;
    }
    return real(data, size, count, stream);
}

#define READING(type, name, parameters, arguments, ...)                           \
    type name parameters {                                                        \
        REAL(type, #name, __VA_ARGS__);                                           \
        DECIDE(counted[READ] && descriptor_below(descriptor, path), READ, real arguments); \
    }
READING(ssize_t, read, (int descriptor, void *data, size_t size), (descriptor, data, size), int, void *, size_t)
READING(ssize_t, pread, (int descriptor, void *data, size_t size, off_t start), (descriptor, data, size, start),
        int, void *, size_t, off_t)
READING(ssize_t, pread64, (int descriptor, void *data, size_t size, off64_t start), (descriptor, data, size, start),
        int, void *, size_t, off64_t)

int fsync(int descriptor) {
    REAL(int, "fsync", int);
    DECIDE(descriptor_below(descriptor, path), SYNC, real(descriptor));
}
int fdatasync(int descriptor) {
    REAL(int, "fdatasync", int);
    DECIDE(descriptor_below(descriptor, path), SYNC, real(descriptor));
}
int flock(int descriptor, int operation) {
    REAL(int, "flock", int, int);
    DECIDE(descriptor_below(descriptor, path), LOCK, real(descriptor, operation));
}
int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    DECIDE(path_below(AT_FDCWD, to, path) || path_below(AT_FDCWD, from, path), RENAME, real(from, to));
}
int renameat(int old, const char *from, int folder, const char *to) {
    REAL(int, "renameat", int, const char *, int, const char *);
    DECIDE(path_below(folder, to, path) || path_below(old, from, path), RENAME, real(old, from, folder, to));
}
int renameat2(int old, const char *from, int folder, const char *to, unsigned flags) {
    REAL(int, "renameat2", int, const char *, int, const char *, unsigned);
    DECIDE(path_below(folder, to, path) || path_below(old, from, path), RENAME, real(old, from, folder, to, flags));
}
int link(const char *from, const char *to) {
    REAL(int, "link", const char *, const char *);
    DECIDE(path_below(AT_FDCWD, to, path), LINK, real(from, to));
}
int linkat(int old, const char *from, int folder, const char *to, int flags) {
    REAL(int, "linkat", int, const char *, int, const char *, int);
    DECIDE(path_below(folder, to, path), LINK, real(old, from, folder, to, flags));
}
int symlink(const char *from, const char *to) {
    REAL(int, "symlink", const char *, const char *);
    DECIDE(path_below(AT_FDCWD, to, path), LINK, real(from, to));
}
int mkdir(const char *name, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    DECIDE(path_below(AT_FDCWD, name, path), MKDIR, real(name, mode));
}
int mkdirat(int folder, const char *name, mode_t mode) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    DECIDE(path_below(folder, name, path), MKDIR, real(folder, name, mode));
}
int unlink(const char *name) {
    REAL(int, "unlink", const char *);
    DECIDE(path_below(AT_FDCWD, name, path), UNLINK, real(name));
}
int unlinkat(int folder, const char *name, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    DECIDE(path_below(folder, name, path), UNLINK, real(folder, name, flags));
}
int rmdir(const char *name) {
    REAL(int, "rmdir", const char *);
    DECIDE(path_below(AT_FDCWD, name, path), UNLINK, real(name));
}

/* Seconds that the wall clock is off now. */
static int off(void) {
    return offsets[(__atomic_fetch_add(&questions, 1, __ATOMIC_SEQ_CST) / every) % moves];
}
int clock_gettime(clockid_t clock, struct timespec *now) {
    REAL(int, "clock_gettime", clockid_t, struct timespec *);
    int answer = real(clock, now);
    if (moves && !answer && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += off();
    return answer;
}
int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    REAL(int, "gettimeofday", struct timeval *, void *);
    int answer = real(now, zone);
    if (moves && !answer) now->tv_sec += off();
    return answer;
}
time_t time(time_t *now) {
    REAL(time_t, "time", time_t *);
    time_t answer = real(NULL) + (moves ? off() : 0);
    if (now) *now = answer;
    return answer;
}

static int none_left(int *left) { return *left >= 0 && __atomic_fetch_sub(left, 1, __ATOMIC_SEQ_CST) <= 0; }

int pthread_create(pthread_t *thread, const pthread_attr_t *how_to, void *(*work)(void *), void *given) {
    REAL(int, "pthread_create", pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (threads >= 0 && none_left(&threads)) {
        threads = 0;
        return EAGAIN;
    }
    return real(thread, how_to, work, given);
}
static pid_t start_process(void) {
    REAL(pid_t, "fork", void);
    if (forks >= 0 && none_left(&forks)) {
        forks = 0;
        errno = EAGAIN;
        return -1;
    }
    return real();
}
pid_t fork(void) { return start_process(); }
pid_t vfork(void) { return start_process(); } /* nothing can stand before vfork itself: it returns twice */
