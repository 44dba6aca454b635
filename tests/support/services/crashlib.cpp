// Thirteen ways in which native code ends a process. crash_* call each other so that stacks have something to show.
#include <csignal>
#include <cstdlib>
#include <exception>
#include <fcntl.h>
#include <pthread.h>
#include <stdexcept>
#include <sys/mman.h>
#include <unistd.h>

#define LOCAL static __attribute__((noinline))
#define EXPORTED extern "C" __attribute__((noinline, visibility("default")))

extern "C" const long crash_read_only = 1;
static volatile long sink;
static void (*volatile null_function)();

LOCAL long overflow(long depth) {
    volatile char room[4096];
    room[0] = static_cast<char>(depth);
    return overflow(depth + 1) + room[0];
}

LOCAL void smash() {  // overwrites its own return address, and its caller's, with a non-canonical one
    volatile long room[2] = {0, 0};
    volatile long *up = room;
    for (int i = 0; i < 8; i++) up[i] = 0x4242424242424242;
}

LOCAL void truncated_file() {
    int fd = memfd_create("bus", 0);
    if (ftruncate(fd, 4096)) return;
    auto *page = static_cast<volatile char *>(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    if (ftruncate(fd, 0)) return;
    page[5] = 1;
}

LOCAL void throw_it() { throw std::runtime_error("nobody catches this"); }

LOCAL void crash_static(int kind) {
    switch (kind) {
    case 0: *reinterpret_cast<volatile int *>(0x18) = 1; break;
    case 1: std::abort();
    case 2: sink = overflow(0); break;
    case 3: {
        void *volatile block = std::malloc(100);
        std::free(block);
        std::free(block);
        break;
    }
    case 4: {
        volatile int zero = 0, seven = 7;
        sink = seven / zero;
        break;
    }
    case 5: __builtin_trap();
    case 6: []() noexcept { throw_it(); }(); break;
    case 7: null_function(); break;
    case 8: truncated_file(); break;
    case 9: *reinterpret_cast<volatile long *>(0x4141414141414141) = 1; break;
    case 10: smash(); break;
    case 11: *const_cast<volatile long *>(&crash_read_only) = 2; break;
    case 12: throw_it();  // never returns: the last instruction, whose return address is in another function
    }
    sink = sink + 1;  // no tail calls: every caller keeps its frame
}

EXPORTED void crash(int kind) {
    crash_static(kind);
    sink = sink + 1;
}

LOCAL void *body(void *kind) {
    crash(*static_cast<int *>(kind));
    sink = sink + 1;
    return nullptr;
}

static pthread_barrier_t start;

LOCAL void *one_of_many(void *number) {  // every other one divides by zero
    pthread_barrier_wait(&start);
    crash(reinterpret_cast<long>(number) % 2 ? 4 : 0);
    sink = sink + 1;
    return nullptr;
}

EXPORTED void crash_together(long threads) {
    pthread_barrier_init(&start, nullptr, threads);
    pthread_t thread;
    for (long i = 0; i < threads; i++) pthread_create(&thread, nullptr, one_of_many, reinterpret_cast<void *>(i));
    pause();
}

EXPORTED void crash_in_pthread(int kind) {
    pthread_t thread;
    if (pthread_create(&thread, nullptr, body, &kind) == 0) pthread_join(thread, nullptr);
}
