/* Preloaded into a process: a disk that fails at one call. Calls count that change files below a folder.

   faulty_disk_set(folder, at, number, stays) arms it: call number `at` fails with errno `number`, and if `stays` is not 0
   all later ones as well. If `number` is -1 the process is killed instead. faulty_disk_calls() returns the number of calls so far. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static int fails_at, error_number, stays, calls;

void faulty_disk_set(const char *folder, int at, int number, int remains) {
    snprintf(root, sizeof root, "%s", folder);
    fails_at = at; error_number = number; stays = remains; calls = 0;
}

int faulty_disk_calls(void) { return calls; }

static int refuses(const char *path) {
    if (!root[0] || strncmp(path, root, strlen(root)) != 0) return 0;
    int number = __sync_add_and_fetch(&calls, 1);
    if (!fails_at || number < fails_at || (number > fails_at && !stays)) return 0;
    if (error_number < 0) kill(getpid(), SIGKILL);
    errno = error_number;
    return 1;
}

static int refuses_at(int folder, const char *path) {
    if (!root[0]) return 0;
    if (path[0] == '/') return refuses(path);
    char link[64], whole[2 * PATH_MAX], base[PATH_MAX];
    ssize_t length;
    if (folder == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
    if ((length = readlink(link, base, sizeof base - 1)) < 0) return 0;
    base[length] = 0;
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    return refuses(whole);
}

static int refuses_file(int file) {
    if (!root[0]) return 0;
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    int kept = errno;
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = kept;
    if (length < 0) return 0;
    path[length] = 0;
    return refuses(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define WRITES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))
#define MODE(flags) mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }

int open(const char *path, int flags, ...) {
    MODE(flags)
    if (WRITES(flags) && refuses_at(AT_FDCWD, path)) return -1;
    return REAL(open)(path, flags, mode);
}
int open64(const char *path, int flags, ...) {
    MODE(flags)
    if (WRITES(flags) && refuses_at(AT_FDCWD, path)) return -1;
    return REAL(open64)(path, flags, mode);
}
int openat(int folder, const char *path, int flags, ...) {
    MODE(flags)
    if (WRITES(flags) && refuses_at(folder, path)) return -1;
    return REAL(openat)(folder, path, flags, mode);
}
int openat64(int folder, const char *path, int flags, ...) {
    MODE(flags)
    if (WRITES(flags) && refuses_at(folder, path)) return -1;
    return REAL(openat64)(folder, path, flags, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    if (mode[0] != 'r' && refuses_at(AT_FDCWD, path)) return NULL;
    return REAL(fopen64)(path, mode);
}
ssize_t write(int file, const void *data, size_t size) { return refuses_file(file) ? -1 : REAL(write)(file, data, size); }
ssize_t writev(int file, const struct iovec *parts, int count) {
    return refuses_file(file) ? -1 : REAL(writev)(file, parts, count);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    return refuses_file(file) ? -1 : REAL(pwrite)(file, data, size, at);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    return refuses_file(file) ? -1 : REAL(pwrite64)(file, data, size, at);
}
int fsync(int file) { return refuses_file(file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return refuses_file(file) ? -1 : REAL(fdatasync)(file); }
int ftruncate(int file, off_t size) { return refuses_file(file) ? -1 : REAL(ftruncate)(file, size); }
int ftruncate64(int file, off64_t size) { return refuses_file(file) ? -1 : REAL(ftruncate64)(file, size); }
int fallocate(int file, int mode, off_t at, off_t size) {
    return refuses_file(file) ? -1 : REAL(fallocate)(file, mode, at, size);
}
int mkdir(const char *path, mode_t mode) { return refuses_at(AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode); }
int rename(const char *from, const char *to) { return refuses_at(AT_FDCWD, to) ? -1 : REAL(rename)(from, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    return refuses_at(b, to) ? -1 : REAL(renameat2)(a, from, b, to, flags);
}
