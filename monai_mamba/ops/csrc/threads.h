/* Locks, conditions and threads of POSIX and of Windows, for library.c. */
#ifndef MONAI_MAMBA_THREADS_H
#define MONAI_MAMBA_THREADS_H

#include <stdint.h>

/* What a thread does; a number tells it where it begins. */
static void worker(uint64_t seen);

#if defined(_WIN32)

#define WIN32_LEAN_AND_MEAN
#include <windows.h>

typedef SRWLOCK lock_type;
typedef CONDITION_VARIABLE condition_type;
#define LOCK_INIT SRWLOCK_INIT
#define CONDITION_INIT CONDITION_VARIABLE_INIT

static inline void take_lock(lock_type *l) { AcquireSRWLockExclusive(l); }
static inline int try_lock(lock_type *l) { return TryAcquireSRWLockExclusive(l); }
static inline void give_lock(lock_type *l) { ReleaseSRWLockExclusive(l); }
static inline void wait_for(condition_type *c, lock_type *l) { SleepConditionVariableSRW(c, l, INFINITE, 0); }
static inline void wake_one(condition_type *c) { WakeConditionVariable(c); }
static inline void wake_all(condition_type *c) { WakeAllConditionVariable(c); }
static inline void give_way(void) { SwitchToThread(); }

static DWORD WINAPI thread_main(LPVOID seen) {
    worker((uint64_t)(uintptr_t)seen);
    return 0;
}

/* Returns 0 if there are no more threads to be had. */
static inline int start_worker(uint64_t seen) {
    HANDLE thread = CreateThread(NULL, 0, thread_main, (void *)(uintptr_t)seen, 0, NULL);
    return thread && CloseHandle(thread);
}

/* Windows knows no fork. */
static inline void call_after_fork(void (*in_child)(void)) { (void)in_child; }

#else

#include <pthread.h>
#include <sched.h>

typedef pthread_mutex_t lock_type;
typedef pthread_cond_t condition_type;
#define LOCK_INIT PTHREAD_MUTEX_INITIALIZER
#define CONDITION_INIT PTHREAD_COND_INITIALIZER

static inline void take_lock(lock_type *l) { pthread_mutex_lock(l); }
static inline int try_lock(lock_type *l) { return !pthread_mutex_trylock(l); }
static inline void give_lock(lock_type *l) { pthread_mutex_unlock(l); }
static inline void wait_for(condition_type *c, lock_type *l) { pthread_cond_wait(c, l); }
static inline void wake_one(condition_type *c) { pthread_cond_signal(c); }
static inline void wake_all(condition_type *c) { pthread_cond_broadcast(c); }
static inline void give_way(void) { sched_yield(); }

static void *thread_main(void *seen) {
    worker((uint64_t)(uintptr_t)seen);
    return NULL;
}

static inline int start_worker(uint64_t seen) {
    pthread_t thread;
    pthread_attr_t attributes;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    int error = pthread_create(&thread, &attributes, thread_main, (void *)(uintptr_t)seen);
    pthread_attr_destroy(&attributes);
    return !error;
}

static inline void call_after_fork(void (*in_child)(void)) { pthread_atfork(NULL, NULL, in_child); }

#endif
#endif
