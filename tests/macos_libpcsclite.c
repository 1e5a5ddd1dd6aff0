/* PC/SC as a forked process finds it on macOS: a libpcsclite.so.1 that stands in front of the real one.  See macos.py.

In a process that was exec'd every call is forwarded, unchanged.  In one that was forked and has not exec'd since

- SCardEstablishContext answers SCARD_E_NO_SERVICE, as since El Capitan (LudovicRousseau/pyscard#73);
- every call that takes a context or a card raises SIGSEGV, as libdispatch does since Yosemite;
- the connections to pcscd that its parent had are closed: macOS' are Mach ports, which a fork does not inherit;
- SCardFreeMemory, pcsc_stringify_error and the g_rgSCard*Pci work, for they need no connection.

Not simulated: anything else that macOS' PC/SC does differently.  Two forks are not seen as such: one made by clone(2)
itself runs no handler, so its connections stay open; and of a process that loads this library only after it was forked,
it is the kernel (PF_FORKNOEXEC in /proc/self/stat) that knows it, so without /proc it is taken for an exec'd one.

At a fork: the handler closes; all else is judged anew at each call, by the PID of the process that loaded the library.
*/
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef REAL
#error "-DREAL=\"path\": the absolute path of the real library"
#endif

#define PF_FORKNOEXEC 0x40 /* linux/sched.h */
#define MOST_DESCRIPTORS 4096
#define NO_SERVICE ((long)0x8010001D) /* as pcsc-lite spells it; macOS has 32 bits */

typedef uintptr_t word; /* every argument of PC/SC is a long, a DWORD or a pointer: on Linux all of one size */

typedef struct {
    unsigned long protocol, length;
} pci;

pci g_rgSCardT0Pci, g_rgSCardT1Pci, g_rgSCardRawPci;

/* Which process this is. */

static pid_t loaded_by;
static int loaded_after_fork;

static int is_forked(void)
{
    return loaded_after_fork || getpid() != loaded_by;
}

static int was_forked_before(void)
{
    char text[512] = "";
    unsigned long flags = 0;
    FILE *stat = fopen("/proc/self/stat", "re");

    if (stat == NULL)
        return 0;
    /* the seventh word after the name of the program, which may hold anything */
    if (fgets(text, sizeof text, stat) != NULL && strrchr(text, ')') != NULL)
        sscanf(strrchr(text, ')') + 1, " %*c %*d %*d %*d %*d %*d %lu", &flags);
    fclose(stat);
    return (flags & PF_FORKNOEXEC) != 0;
}

static const char *name_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    return slash == NULL ? path : slash + 1;
}

static void close_connections(void)
{
    const char *path = getenv("PCSCLITE_CSOCK_NAME");
    const char *pcscd = name_of(path == NULL || *path == '\0' ? "pcscd.comm" : path);

    for (int descriptor = 0; descriptor < MOST_DESCRIPTORS; descriptor++) {
        struct sockaddr_un peer = {0};
        socklen_t size = sizeof peer - 1;
        /* only the last part of the path: pcscd may have been bound to another name of the same directory */
        if (getpeername(descriptor, (struct sockaddr *)&peer, &size) == 0 && peer.sun_family == AF_UNIX &&
            strcmp(name_of(peer.sun_path), pcscd) == 0)
            close(descriptor);
    }
}

/* Die of SIGSEGV, whatever the program does about that signal.  A handler that dumps the stack may do so. */
static void die(void)
{
    sigset_t only;

    prctl(PR_SET_DUMPABLE, 0); /* no core file: it is meant to die */
    raise(SIGSEGV);
    signal(SIGSEGV, SIG_DFL);
    sigemptyset(&only);
    sigaddset(&only, SIGSEGV);
    pthread_sigmask(SIG_UNBLOCK, &only, NULL);
    raise(SIGSEGV);
    _exit(128 + SIGSEGV);
}

/* The functions of the real library, by their number of arguments. */

#define FUNCTIONS_WITH_A_HANDLE(X) \
    X(SCardReleaseContext, 1)      \
    X(SCardIsValidContext, 1)      \
    X(SCardConnect, 6)             \
    X(SCardReconnect, 5)           \
    X(SCardDisconnect, 2)          \
    X(SCardBeginTransaction, 1)    \
    X(SCardEndTransaction, 2)      \
    X(SCardStatus, 7)              \
    X(SCardGetStatusChange, 4)     \
    X(SCardControl, 7)             \
    X(SCardTransmit, 7)            \
    X(SCardListReaderGroups, 3)    \
    X(SCardListReaders, 4)         \
    X(SCardCancel, 1)              \
    X(SCardGetAttrib, 4)           \
    X(SCardSetAttrib, 4)

#define PARAMETERS_1 word a
#define PARAMETERS_2 PARAMETERS_1, word b
#define PARAMETERS_3 PARAMETERS_2, word c
#define PARAMETERS_4 PARAMETERS_3, word d
#define PARAMETERS_5 PARAMETERS_4, word e
#define PARAMETERS_6 PARAMETERS_5, word f
#define PARAMETERS_7 PARAMETERS_6, word g
#define ARGUMENTS_1 a
#define ARGUMENTS_2 ARGUMENTS_1, b
#define ARGUMENTS_3 ARGUMENTS_2, c
#define ARGUMENTS_4 ARGUMENTS_3, d
#define ARGUMENTS_5 ARGUMENTS_4, e
#define ARGUMENTS_6 ARGUMENTS_5, f
#define ARGUMENTS_7 ARGUMENTS_6, g

#define FORWARD(name, count)                         \
    static long (*real_##name)(PARAMETERS_##count);  \
    long name(PARAMETERS_##count)                    \
    {                                                \
        if (is_forked())                             \
            die();                                   \
        return real_##name(ARGUMENTS_##count);       \
    }

FUNCTIONS_WITH_A_HANDLE(FORWARD)

static long (*real_SCardEstablishContext)(PARAMETERS_4);
static long (*real_SCardFreeMemory)(PARAMETERS_2);
static const char *(*real_pcsc_stringify_error)(long);

long SCardEstablishContext(PARAMETERS_4)
{
    return is_forked() ? NO_SERVICE : real_SCardEstablishContext(ARGUMENTS_4);
}

long SCardFreeMemory(PARAMETERS_2)
{
    return real_SCardFreeMemory(ARGUMENTS_2);
}

const char *pcsc_stringify_error(long code)
{
    return real_pcsc_stringify_error(code);
}

/* An absolute path, so that the loader does not take the SONAME that both have for a reason to give us ourselves. */
static void *real(const char *symbol)
{
    static void *library;
    void *found;

    if (library == NULL)
        library = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
    found = library == NULL ? NULL : dlsym(library, symbol);
    if (found == NULL) {
        fprintf(stderr, "the simulation of macOS can't forward to " REAL ": %s\n", dlerror());
        abort();
    }
    return found;
}

__attribute__((constructor)) static void load(void)
{
    loaded_by = getpid();
    loaded_after_fork = was_forked_before();
#define LOAD(name, count) *(void **)&real_##name = real(#name);
    FUNCTIONS_WITH_A_HANDLE(LOAD)
    LOAD(SCardEstablishContext, 4)
    LOAD(SCardFreeMemory, 2)
    LOAD(pcsc_stringify_error, 1)
    g_rgSCardT0Pci = *(pci *)real("g_rgSCardT0Pci");
    g_rgSCardT1Pci = *(pci *)real("g_rgSCardT1Pci");
    g_rgSCardRawPci = *(pci *)real("g_rgSCardRawPci");
    if (real_SCardTransmit == SCardTransmit) {
        fprintf(stderr, "the simulation of macOS was given itself for the real library: " REAL "\n");
        abort();
    }
    pthread_atfork(NULL, NULL, close_connections);
}
