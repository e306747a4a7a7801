/* Loaded with LD_PRELOAD: makes the n-th system call on a path below a folder fail, or ends the process there.
 *
 * faults_arm(folder, operation, error) starts counting. The operation of that number, from 0, fails with errno `error`;
 * error 0 ends the process with SIGKILL. A negative number only counts. faults_count() returns the number of operations
 * since faults_arm(), and faults_disarm() stops counting. faults_name() returns the last operation that failed.
 *
 * A write that fails or ends the process first writes half of its bytes, as on a full disk.
 */
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
#include <unistd.h>

static char folder[PATH_MAX];
static int armed = 0, chosen = -1, error_number = 0, count = 0;
static char name[64 + PATH_MAX];

void faults_arm(const char *below, int operation, int error) {
    snprintf(folder, sizeof folder, "%s", below);
    chosen = operation, error_number = error, count = 0, name[0] = 0;
    __atomic_store_n(&armed, 1, __ATOMIC_SEQ_CST);
}
int faults_count(void) { return count; }
const char *faults_name(void) { return name; }
void faults_disarm(void) { armed = 0; }

static int is_below(const char *path) {
    char whole[PATH_MAX];
    if (!armed || path == NULL) return 0;
    if (path[0] != '/') {
        if (getcwd(whole, sizeof whole) == NULL) return 0;
        return strncmp(whole, folder, strlen(folder)) == 0;
    }
    return strncmp(path, folder, strlen(folder)) == 0;
}

static int is_file_below(int descriptor) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return path[0] == '/' && is_below(path); /* pipes and the like have other names */
}

/* Whether this operation fails; sets errno. */
static int fails(const char *operation, const char *path) {
    int number = __atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST);
    if (number != chosen) return 0;
    snprintf(name, sizeof name, "%s %s", operation, path);
    if (error_number == 0) {
        kill(getpid(), SIGKILL);
        pause();
    }
    errno = error_number;
    return 1;
}

#define REAL(function) ((__typeof__(&function))dlsym(RTLD_NEXT, #function))
#define OPEN(function)                                                                 \
    int function(const char *path, int flags, ...) {                                   \
        va_list rest;                                                                  \
        va_start(rest, flags);                                                         \
        mode_t mode = va_arg(rest, mode_t);                                            \
        va_end(rest);                                                                  \
        return is_below(path) && fails("open", path) ? -1 : REAL(function)(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

int openat(int at, const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    return is_below(path) && fails("open", path) ? -1 : REAL(openat)(at, path, flags, mode);
}
FILE *fopen(const char *path, const char *mode) {
    return is_below(path) && fails("open", path) ? NULL : REAL(fopen)(path, mode);
}
FILE *fopen64(const char *path, const char *mode) {
    return is_below(path) && fails("open", path) ? NULL : REAL(fopen64)(path, mode);
}
ssize_t read(int descriptor, void *data, size_t size) {
    return is_file_below(descriptor) && fails("read", "") ? -1 : REAL(read)(descriptor, data, size);
}
ssize_t write(int descriptor, const void *data, size_t size) {
    if (is_file_below(descriptor)) {
        if (count == chosen && size > 1 && error_number != 0) {
            chosen++;
            count++;
            return REAL(write)(descriptor, data, size / 2);
        }
        if (count == chosen && size > 1) REAL(write)(descriptor, data, size / 2);
        if (fails("write", "")) return -1;
    }
    return REAL(write)(descriptor, data, size);
}
int fsync(int descriptor) { return is_file_below(descriptor) && fails("fsync", "") ? -1 : REAL(fsync)(descriptor); }
int fchmod(int descriptor, mode_t mode) {
    return is_file_below(descriptor) && fails("fchmod", "") ? -1 : REAL(fchmod)(descriptor, mode);
}
int close(int descriptor) {
    int wrong = is_file_below(descriptor) && fails("close", "");
    int number = errno, result = REAL(close)(descriptor);
    if (wrong) errno = number;
    return wrong ? -1 : result;
}
int rename(const char *from, const char *to) {
    return is_below(to) && fails("rename", to) ? -1 : REAL(rename)(from, to);
}
int mkdir(const char *path, mode_t mode) {
    return is_below(path) && fails("mkdir", path) ? -1 : REAL(mkdir)(path, mode);
}
int unlink(const char *path) { return is_below(path) && fails("unlink", path) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return is_below(path) && fails("rmdir", path) ? -1 : REAL(rmdir)(path); }
int stat(const char *path, struct stat *found) {
    return is_below(path) && fails("stat", path) ? -1 : REAL(stat)(path, found);
}
int stat64(const char *path, struct stat64 *found) {
    return is_below(path) && fails("stat", path) ? -1 : REAL(stat64)(path, found);
}
/* One operation that is not a call of this library, such as the start of a process. Returns its errno, or 0. */
int faults_step(const char *operation) { return fails(operation, "") ? error_number : 0; }
pid_t fork(void) {
    if (armed && fails("fork", "")) return -1;
    pid_t child = REAL(fork)();
    if (child == 0) armed = 0;
    return child;
}
