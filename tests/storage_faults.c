/* A storage that does not always answer, for the processes that load this library before libc (LD_PRELOAD).

   Calls on files under the folders fail at random: open, stat, read, write, fsync, rename, mkdir with ESTALE or EIO, a
   write after a part of it has been written. With FAULTS_FULL the storage has room for so many bytes more, and then
   answers writes with ENOSPC; nothing else fails.

     FAULTS_FOLDERS   absolute paths, separated by colons
     FAULTS_EXCEPT    no file with this in its path
     FAULTS_SEED      of the draws, which differ from process to process
     FAULTS_EVERY     of so many calls one fails; 0: none
     FAULTS_FULL      bytes
     FAULTS_LOG       file that gets a line for each fault: call, error, path */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_FILES 65536
#define PATH_BYTES 1024
#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static char folders[16][PATH_BYTES];
static const char *except = "", *log_path = NULL;
static int num_folders = 0;
static long every = 0, full = -1;
static uint64_t seed = 1;
static _Atomic uint64_t draws = 1;
static _Atomic long calls = 0;
static _Atomic long written = 0;
static char *paths[MOST_FILES]; /* of the files that are open under the folders */

static uint64_t mixed(uint64_t z) { /* splitmix64's */
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static uint64_t draw(void) { return mixed(atomic_fetch_add(&draws, 0x9E3779B97F4A7C15u)); }

/* Whether it is this call that fails: one of each `every`, at a place of its own, so that no run is spared by chance. */
static int is_due(void) {
    if (every <= 0) return 0;
    long call = atomic_fetch_add(&calls, 1);
    return call % every == (long)(mixed(seed + (uint64_t)(call / every + 1) * 0x9E3779B97F4A7C15u) % every);
}

static void differ_in_child(void) {
    atomic_fetch_add(&draws, (uint64_t)getpid() << 20);
    seed += (uint64_t)getpid() << 20;
}

__attribute__((constructor)) static void begin(void) {
    const char *names = getenv("FAULTS_FOLDERS");
    char copy[16 * PATH_BYTES], *rest = copy, *name;
    if (names == NULL) return;
    snprintf(copy, sizeof copy, "%s", names);
    while (num_folders < 16 && (name = strsep(&rest, ":")) != NULL)
        snprintf(folders[num_folders++], PATH_BYTES, "%s", name);
    if (getenv("FAULTS_EXCEPT")) except = getenv("FAULTS_EXCEPT");
    if (getenv("FAULTS_EVERY")) every = atol(getenv("FAULTS_EVERY"));
    if (getenv("FAULTS_FULL")) full = atol(getenv("FAULTS_FULL"));
    if (getenv("FAULTS_SEED")) draws = seed = strtoull(getenv("FAULTS_SEED"), NULL, 10) * 0xD1342543DE82EF95u + 1;
    log_path = getenv("FAULTS_LOG");
    pthread_atfork(NULL, NULL, differ_in_child);
}

static int is_under(const char *path) {
    char absolute[2 * PATH_BYTES];
    if (path == NULL || num_folders == 0) return 0;
    if (path[0] != '/') {
        char here[PATH_BYTES];
        if (getcwd(here, sizeof here) == NULL) return 0;
        snprintf(absolute, sizeof absolute, "%s/%.1000s", here, path);
        path = absolute;
    }
    if (except[0] && strstr(path, except)) return 0;
    for (int i = 0; i < num_folders; i++) {
        size_t length = strlen(folders[i]);
        if (strncmp(path, folders[i], length) == 0 && (path[length] == '/' || path[length] == 0)) return 1;
    }
    return 0;
}

static void note(const char *call, int error, const char *path) {
    char line[PATH_BYTES + 64];
    if (log_path == NULL) return;
    int length = snprintf(line, sizeof line, "%s %d %.1000s\n", call, error, path);
    int file = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_APPEND | O_CREAT, 0644);
    if (file >= 0) {
        syscall(SYS_write, file, line, length);
        syscall(SYS_close, file);
    }
}

/* Whether a call on `path` fails now; sets errno. */
static int fails(const char *call, const char *path) {
    if (!is_due()) return 0;
    int error = draw() % 2 ? ESTALE : EIO;
    note(call, error, path);
    errno = error;
    return 1;
}

static const char *path_of(int file) { return file >= 0 && file < MOST_FILES ? paths[file] : NULL; }

static int opened(int file, const char *path) {
    if (file >= 0 && file < MOST_FILES) paths[file] = strdup(path);
    return file;
}

#define OPEN(name)                                                          \
    int name(const char *path, int flags, ...) {                            \
        mode_t mode = 0;                                                    \
        va_list more;                                                       \
        va_start(more, flags);                                              \
        if (flags & (O_CREAT | O_TMPFILE)) mode = va_arg(more, mode_t);     \
        va_end(more);                                                       \
        if (!is_under(path)) return REAL(name)(path, flags, mode);          \
        if (fails("open", path)) return -1;                                 \
        return opened(REAL(name)(path, flags, mode), path);                 \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                        \
    int name(int folder, const char *path, int flags, ...) {                \
        mode_t mode = 0;                                                    \
        va_list more;                                                       \
        va_start(more, flags);                                              \
        if (flags & (O_CREAT | O_TMPFILE)) mode = va_arg(more, mode_t);     \
        va_end(more);                                                       \
        if (folder != AT_FDCWD || !is_under(path)) return REAL(name)(folder, path, flags, mode); \
        if (fails("open", path)) return -1;                                 \
        return opened(REAL(name)(folder, path, flags, mode), path);         \
    }
OPENAT(openat)
OPENAT(openat64)

int close(int file) {
    if (path_of(file) != NULL) {
        free(paths[file]);
        paths[file] = NULL;
    }
    return REAL(close)(file);
}

#define READ(name, arguments, ...)                                          \
    ssize_t name arguments {                                                \
        if (path_of(file) != NULL && fails("read", path_of(file))) return -1; \
        return REAL(name)(__VA_ARGS__);                                     \
    }
READ(read, (int file, void *bytes, size_t count), file, bytes, count)
READ(pread, (int file, void *bytes, size_t count, off_t at), file, bytes, count, at)
READ(pread64, (int file, void *bytes, size_t count, off64_t at), file, bytes, count, at)

/* A write that fails leaves a part of its bytes behind: a torn line, half a tensor. */
ssize_t write(int file, const void *bytes, size_t count) {
    const char *path = path_of(file);
    if (path == NULL) return REAL(write)(file, bytes, count);
    if (full >= 0 && atomic_fetch_add(&written, count) + (long)count > full) {
        REAL(write)(file, bytes, count / 2);
        note("write", ENOSPC, path);
        errno = ENOSPC;
        return -1;
    }
    if (is_due()) {
        int error = draw() % 2 ? ESTALE : EIO;
        REAL(write)(file, bytes, draw() % (count + 1));
        note("write", error, path);
        errno = error;
        return -1;
    }
    return REAL(write)(file, bytes, count);
}

int fsync(int file) {
    if (path_of(file) != NULL && fails("fsync", path_of(file))) return -1;
    return REAL(fsync)(file);
}

#define BY_PATH(name, call, arguments, ...)                                 \
    int name arguments {                                                    \
        if (is_under(path) && fails(call, path)) return -1;                 \
        return REAL(name)(__VA_ARGS__);                                     \
    }
BY_PATH(stat, "stat", (const char *path, struct stat *facts), path, facts)
BY_PATH(stat64, "stat", (const char *path, struct stat64 *facts), path, facts)
BY_PATH(lstat, "stat", (const char *path, struct stat *facts), path, facts)
BY_PATH(lstat64, "stat", (const char *path, struct stat64 *facts), path, facts)
BY_PATH(fstatat, "stat", (int folder, const char *path, struct stat *facts, int flags), folder, path, facts, flags)
BY_PATH(fstatat64, "stat", (int folder, const char *path, struct stat64 *facts, int flags), folder, path, facts, flags)
BY_PATH(mkdir, "mkdir", (const char *path, mode_t mode), path, mode)
BY_PATH(unlink, "unlink", (const char *path), path)
BY_PATH(rename, "rename", (const char *path, const char *to), path, to)
