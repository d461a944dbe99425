/*
 * Simulated power cut: a preloaded library that keeps, for every file in $POWER_CUT_DIR, a copy in
 * $POWER_CUT_SHADOW as of its last fsync or fdatasync. After SIGKILL the shadow is what a disk would hold that
 * lost everything not synced.
 *
 * A copy is made under a temporary name (.tmp-*) and renamed, so a kill in its midst leaves the one before; the
 * sync returns only when the copy is in place. rename and unlink are followed at once: directory entries count
 * as durable, contents do not (a file renamed before its first sync comes back empty). Every sync adds the name
 * of its file as a line to $POWER_CUT_SHADOW.syncs, so that a test can tell that the library was in force.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Name within the watched directory, or NULL for a path elsewhere. */
static const char *watched(const char *path) {
    const char *root = getenv("POWER_CUT_DIR");
    size_t length = root ? strlen(root) : 0;
    if (!length || strncmp(path, root, length) != 0 || path[length] != '/') return NULL;
    const char *name = path + length + 1;
    return *name && !strchr(name, '/') ? name : NULL;
}

static int shadow_path(char *path, const char *prefix, const char *name) {
    const char *shadow = getenv("POWER_CUT_SHADOW");
    if (!shadow) return -1;
    int length = snprintf(path, PATH_MAX, "%s/%s%s", shadow, prefix, name);
    return length > 0 && length < PATH_MAX ? 0 : -1;
}

static int copy(int from, int to) {
    static __thread char buffer[1 << 16];
    off_t at = 0;
    for (;;) {
        ssize_t size = pread(from, buffer, sizeof buffer, at);
        if (size == 0) return 0;
        if (size < 0 || write(to, buffer, (size_t)size) != size) return -1;
        at += size;
    }
}

static void note(const char *name) {
    char path[PATH_MAX], line[NAME_MAX + 2];
    const char *shadow = getenv("POWER_CUT_SHADOW");
    int length = snprintf(line, sizeof line, "%s\n", name);
    snprintf(path, sizeof path, "%s.syncs", shadow ? shadow : "");
    int file = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (file < 0) return;
    if (write(file, line, (size_t)length) < 0) errno = 0;
    close(file);
}

/* Take the copy; -1 fails the sync, so that a broken model never passes for a durable disk. */
static int keep(int descriptor) {
    char link[64], path[PATH_MAX], temporary[PATH_MAX], target[PATH_MAX], prefix[64];
    struct stat status;
    if (fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = '\0';
    const char *name = watched(path);
    if (!name) return 0;
    snprintf(prefix, sizeof prefix, ".tmp-%ld-", (long)syscall(SYS_gettid));
    if (shadow_path(temporary, prefix, name) || shadow_path(target, "", name)) return -1;
    /* The given descriptor is read where it can be: closing another one would drop SQLite's POSIX locks. */
    int writable_only = (fcntl(descriptor, F_GETFL) & O_ACCMODE) == O_WRONLY;
    int from = writable_only ? open(path, O_RDONLY | O_CLOEXEC) : descriptor;
    int to = open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    int failed = from < 0 || to < 0 || copy(from, to) != 0;
    if (to >= 0) close(to);
    if (writable_only && from >= 0) close(from);
    failed = failed || renameat(AT_FDCWD, temporary, AT_FDCWD, target) != 0;
    if (failed) {
        errno = EIO;
        return -1;
    }
    note(name);
    return 0;
}

int fsync(int descriptor) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fsync");
    return real(descriptor) != 0 ? -1 : keep(descriptor);
}

int fdatasync(int descriptor) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    return real(descriptor) != 0 ? -1 : keep(descriptor);
}

int unlink(const char *path) {
    static int (*real)(const char *);
    char target[PATH_MAX];
    if (!real) real = (int (*)(const char *))dlsym(RTLD_NEXT, "unlink");
    int result = real(path);
    int saved = errno;
    const char *name = watched(path);
    if (result == 0 && name && shadow_path(target, "", name) == 0) real(target);
    errno = saved;
    return result;
}

int rename(const char *from, const char *to) {
    static int (*real)(const char *, const char *);
    char source[PATH_MAX], target[PATH_MAX];
    if (!real) real = (int (*)(const char *, const char *))dlsym(RTLD_NEXT, "rename");
    int result = real(from, to);
    int saved = errno;
    const char *old = watched(from), *new = watched(to);
    if (result == 0 && old && new && !shadow_path(source, "", old) && !shadow_path(target, "", new) &&
        real(source, target) != 0) {
        int empty = open(target, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        if (empty >= 0) close(empty);
    }
    errno = saved;
    return result;
}
