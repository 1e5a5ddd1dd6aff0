/* PC/SC as a forked process finds it on macOS: a libpcsclite.so.1 that forwards to the real one.  See macos.py.

In a process that was exec'd every call is forwarded, unchanged.  In one that was forked and has not exec'd since

- SCardEstablishContext returns SCARD_E_NO_SERVICE, as since El Capitan (LudovicRousseau/pyscard#73);
- every call that takes a context or a card raises SIGSEGV, as libdispatch does since Yosemite;
- its parent's connections to pcscd are closed: on macOS they are Mach ports, which a child does not inherit;
- SCardFreeMemory, pcsc_stringify_error and the g_rgSCard*Pci work, for they need no connection.

In every process

- codes have 32 bits, so error codes are negative;
- the state of a reader has no event counter;
- there is no reader \\\\?PnP?\\Notification;
- the library has no other symbols than Apple's framework.

On request, by files in the directory that PCSCLITE_MACOS_SWITCHES names (see macos.py)

- "cancels-fail": SCardCancel returns SCARD_S_SUCCESS, and does nothing;
- "service-ends": whenever this file grows, the service of each client ends, as macOS' does when it is idle: calls on
  older contexts and their cards return SCARD_E_NO_SERVICE, and their sessions are closed.

Not simulated: anything else that macOS' PC/SC does differently.  Two kinds of fork are not fully simulated.  clone(2)
itself runs no handler, so the connections stay open.  If a process loads this library after it was forked, only the
kernel (PF_FORKNOEXEC in /proc/self/stat) shows the fork, so without /proc the process is taken for an exec'd one.

At a fork the handler closes the connections.  Everything else is decided at each call, by the PID of the process that
loaded the library.
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
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef REAL
#error "-DREAL=\"path\": the absolute path of the real library"
#endif

#define PF_FORKNOEXEC 0x40 /* linux/sched.h */
#define MOST_DESCRIPTORS 4096
#define NO_SERVICE ((long)(int32_t)0x8010001D)
#define MOST_READERS 64

typedef uintptr_t word; /* every argument of PC/SC is a long, a DWORD or a pointer; on Linux all have the same size */

typedef struct {
    unsigned long protocol, length;
} pci;

pci g_rgSCardT0Pci, g_rgSCardT1Pci, g_rgSCardRawPci;

/* Whether this process was forked. */

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

/* Die of SIGSEGV, even if the program handles, ignores or blocks it.  Its handler runs, and may dump the stack. */
static void die(void)
{
    sigset_t only;

    prctl(PR_SET_DUMPABLE, 0); /* no core file: this death is intended */
    raise(SIGSEGV);
    signal(SIGSEGV, SIG_DFL);
    sigemptyset(&only);
    sigaddset(&only, SIGSEGV);
    pthread_sigmask(SIG_UNBLOCK, &only, NULL);
    raise(SIGSEGV);
    _exit(128 + SIGSEGV);
}

/* What a test has requested. */

static int path_of(const char *name, char *path, size_t size)
{
    const char *directory = getenv("PCSCLITE_MACOS_SWITCHES");
    return directory != NULL && (size_t)snprintf(path, size, "%s/%s", directory, name) < size;
}

static int cancels_fail(void)
{
    char path[4096];
    return path_of("cancels-fail", path, sizeof path) && access(path, F_OK) == 0;
}

/* How often the service has ended. */
static long service_ended(void)
{
    char path[4096];
    struct stat status;
    return path_of("service-ends", path, sizeof path) && stat(path, &status) == 0 ? (long)status.st_size : 0;
}

/* The contexts and cards, each with its context and the service that it is on. */

#define MOST_HANDLES 4096

static struct {
    word handle, context;
    long service;
} handles[MOST_HANDLES];

static pthread_mutex_t handles_lock = PTHREAD_MUTEX_INITIALIZER;

static void note(word handle, word context, long service)
{
    int place = 0;

    pthread_mutex_lock(&handles_lock);
    while (place < MOST_HANDLES - 1 && handles[place].handle != 0)
        place++;
    handles[place].handle = handle;
    handles[place].context = context;
    handles[place].service = service;
    pthread_mutex_unlock(&handles_lock);
}

/* Forget a card, or a context and its cards. */
static void forget(word handle)
{
    pthread_mutex_lock(&handles_lock);
    for (int i = 0; i < MOST_HANDLES; i++)
        if (handles[i].handle == handle || handles[i].context == handle)
            handles[i].handle = handles[i].context = 0;
    pthread_mutex_unlock(&handles_lock);
}

/* The context of a context or a card, if the service that it is on has ended; else 0. */
static word ended(word handle)
{
    long now = service_ended();
    word context = 0;

    pthread_mutex_lock(&handles_lock);
    for (int i = 0; i < MOST_HANDLES && handle != 0; i++)
        if (handles[i].handle == handle && handles[i].service < now)
            context = handles[i].context;
    pthread_mutex_unlock(&handles_lock);
    return context;
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

static long narrow(long code)
{
    return (int32_t)code;
}

/* What every call does.  If it detects that the service has ended, it closes the service's sessions. */
#define CHECKED(name, count)                            \
    static long (*real_##name)(PARAMETERS_##count);     \
    static long checked_##name(PARAMETERS_##count)      \
    {                                                   \
        word context;                                   \
        if (is_forked())                                \
            die();                                      \
        context = ended(a);                             \
        if (context != 0) {                             \
            real_SCardReleaseContext(context);          \
            return NO_SERVICE;                          \
        }                                               \
        return narrow(real_##name(ARGUMENTS_##count));  \
    }

FUNCTIONS_WITH_A_HANDLE(CHECKED)

#define FORWARD(name, count)                 \
    long name(PARAMETERS_##count)            \
    {                                        \
        return checked_##name(ARGUMENTS_##count); \
    }

FORWARD(SCardIsValidContext, 1)
FORWARD(SCardReconnect, 5)
FORWARD(SCardBeginTransaction, 1)
FORWARD(SCardEndTransaction, 2)
FORWARD(SCardStatus, 7)
FORWARD(SCardControl, 7)
FORWARD(SCardTransmit, 7)
FORWARD(SCardListReaderGroups, 3)
FORWARD(SCardListReaders, 4)
FORWARD(SCardGetAttrib, 4)
FORWARD(SCardSetAttrib, 4)

long SCardReleaseContext(PARAMETERS_1)
{
    long code = checked_SCardReleaseContext(a);

    forget(a);
    return code;
}

long SCardConnect(PARAMETERS_6)
{
    long service = service_ended(), code = checked_SCardConnect(ARGUMENTS_6);

    if (code == 0)
        note(*(word *)e, a, service);
    return code;
}

long SCardDisconnect(PARAMETERS_2)
{
    long code = checked_SCardDisconnect(ARGUMENTS_2);

    if (code == 0)
        forget(a);
    return code;
}

long SCardCancel(PARAMETERS_1)
{
    if (is_forked())
        die();
    return cancels_fail() ? 0 : checked_SCardCancel(a);
}

/* As winscard.h of pcsc-lite has it. */
typedef struct {
    const char *reader;
    void *user_data;
    unsigned long current, event, atr_size;
    unsigned char atr[33];
} reader_state;

#define CHANGED 0x2UL
#define UNKNOWN 0x4UL
#define TIMED_OUT ((long)(int32_t)0x8010000A)

/* "\\?PnP?\Notification" is an unknown reader: a wait returns immediately, unless the caller knows that state. */
long SCardGetStatusChange(PARAMETERS_4)
{
    reader_state *states = (reader_state *)c, known[MOST_READERS];
    word count = 0, places[MOST_READERS];
    int is_news = 0;
    long code;

    for (word i = 0; i < d && count < MOST_READERS; i++)
        if (states[i].reader != NULL && strcmp(states[i].reader, "\\\\?PnP?\\Notification") == 0) {
            states[i].event = UNKNOWN;
            if ((states[i].current & UNKNOWN) == 0) {
                states[i].event |= CHANGED;
                is_news = 1;
            }
        } else {
            places[count] = i;
            known[count++] = states[i];
        }
    code = checked_SCardGetStatusChange(a, is_news ? 0 : b, (word)known, count);
    for (word i = 0; i < count; i++) {
        known[i].event &= 0xFFFF;
        states[places[i]] = known[i];
    }
    return code == TIMED_OUT && is_news ? 0 : code;
}

static long (*real_SCardEstablishContext)(PARAMETERS_4);
static long (*real_SCardFreeMemory)(PARAMETERS_2);
static const char *(*real_pcsc_stringify_error)(long);

long SCardEstablishContext(PARAMETERS_4)
{
    long service = service_ended(), code = is_forked() ? NO_SERVICE : narrow(real_SCardEstablishContext(ARGUMENTS_4));

    if (code == 0)
        note(*(word *)d, *(word *)d, service);
    return code;
}

long SCardFreeMemory(PARAMETERS_2)
{
    return real_SCardFreeMemory(ARGUMENTS_2);
}

const char *pcsc_stringify_error(long code)
{
    return real_pcsc_stringify_error((uint32_t)code);
}

/* An absolute path: both libraries have the same SONAME, and by name the loader would return this one. */
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
