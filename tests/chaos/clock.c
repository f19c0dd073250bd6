/* A wall clock that can be set, for processes that are started with LD_PRELOAD=this: what it says is the true time and
 * as many seconds as stand in the first eight bytes of the file TRIRANK_CLOCK. The monotonic clock is left alone, as it
 * is when somebody sets the time; so are waits until a moment of it. Waits until a moment of the wall clock end when
 * the true one is there, since the kernel knows no other. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t *offset;

__attribute__((constructor)) static void begin(void) {
    const char *path = getenv("TRIRANK_CLOCK");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file < 0) return;
    void *found = mmap(NULL, sizeof(int64_t), PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (found != MAP_FAILED) offset = found;
}

static int64_t moved(void) { return offset ? *offset : 0; }

static int is_wall(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && is_wall(clock)) now->tv_sec += moved();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = (int)syscall(SYS_gettimeofday, now, zone);
    if (!failed && now) now->tv_sec += moved();
    return failed;
}

time_t time(time_t *kept) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (kept) *kept = now.tv_sec;
    return now.tv_sec;
}

/* A condition does not tell its clock; moments of the monotonic one are far below. */
static const struct timespec *true_moment(const struct timespec *said, struct timespec *room) {
    *room = *said;
    if (said->tv_sec > 1000000000) room->tv_sec -= moved();
    return room;
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict lock,
                           const struct timespec *restrict until) {
    static int (*next)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    struct timespec room;
    if (!next) *(void **)&next = dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2"); /* not the oldest one */
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    return next(cond, lock, true_moment(until, &room));
}

int pthread_mutex_timedlock(pthread_mutex_t *restrict lock, const struct timespec *restrict until) {
    static int (*next)(pthread_mutex_t *, const struct timespec *);
    struct timespec room;
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, "pthread_mutex_timedlock");
    return next(lock, true_moment(until, &room));
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict until) {
    static int (*next)(sem_t *, const struct timespec *);
    struct timespec room;
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, "sem_timedwait");
    return next(semaphore, true_moment(until, &room));
}
