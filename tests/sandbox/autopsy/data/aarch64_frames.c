/* Record the kernel's signal frames on aarch64: one line per fault, "key=value" fields. See README.md here.
 *
 * Run as a program (also under qemu-aarch64) or as the init process of a bare kernel. Beside the raw stack
 * each line has what this program's own C headers make of the frame: the truth that the tests compare with. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <ucontext.h>
#include <unistd.h>

enum { STACK = 8192 };
static const char *const kinds[] = {"null_read", "null_write", "write_read_only", "bus", "ill", "abort", "jump_null"};
enum { KINDS = sizeof kinds / sizeof *kinds };
static const char *kind;
static void (*volatile null_function)(void);
static const int read_only = 1;

static void handler(int signum, siginfo_t *info, void *context) {
    static char line[4096 + 2 * STACK];
    const mcontext_t *saved = &((ucontext_t *)context)->uc_mcontext;
    const unsigned char *base = (const unsigned char *)((unsigned long)__builtin_frame_address(0) & ~15UL);
    int n = sprintf(line, "frame_record kind=%s signal=%d code=%d address=%#lx pid=%d base=%#lx frame=%#lx", kind, signum,
                    info->si_code, (unsigned long)info->si_addr, getpid(), (unsigned long)base, (unsigned long)info);
    for (int i = 0; i < 31; i++) n += sprintf(line + n, " x%d=%#lx", i, (unsigned long)saved->regs[i]);
    n += sprintf(line + n, " sp=%#lx pc=%#lx pstate=%#lx fault_address=%#lx stack=", (unsigned long)saved->sp,
                 (unsigned long)saved->pc, (unsigned long)saved->pstate, (unsigned long)saved->fault_address);
    for (int i = 0; i < STACK; i++) n += sprintf(line + n, "%02x", base[i]);
    line[n++] = '\n';
    for (int at = 0; at < n;) at += write(1, line + at, n - at);
    _exit(0);
}

static void fault(int which) {
    volatile char room[2 * STACK]; /* so that the stack above the frame is mapped */
    room[0] = 0;
    switch (which) {
    case 0: (void)*(volatile int *)0x18; break;
    case 1: *(volatile int *)0x18 = 1; break;
    case 2: *(volatile int *)&read_only = 2; break;
    case 3: {
        int fd = memfd_create("bus", 0);
        if (ftruncate(fd, 4096)) abort();
        volatile char *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (ftruncate(fd, 0)) abort();
        page[5] = 1;
        break;
    }
    case 4: __asm__ volatile("udf #7"); break;
    case 5: abort();
    case 6: null_function(); break;
    }
    room[1] = room[0];
}

int main(void) {
    static const int fatal[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};
    struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO};
    for (unsigned i = 0; i < sizeof fatal / sizeof *fatal; i++) sigaction(fatal[i], &action, NULL);
    for (int which = 0; which < KINDS; which++) {
        kind = kinds[which];
        pid_t child = fork();
        if (child == 0) {
            fault(which);
            _exit(1);
        }
        waitpid(child, NULL, 0);
    }
    if (getpid() == 1) reboot(RB_POWER_OFF);
    return 0;
}
