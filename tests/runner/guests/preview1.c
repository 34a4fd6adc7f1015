// Tries the cases of preview 1 that a read-only folder allows. Prints each as a line "CASE RESULT": an errno, or a
// value.
// Usage: preview1 PREOPEN. The folder holds what tests/runner/test_preview1.py makes.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <wasi/api.h>

#define READ __WASI_RIGHTS_FD_READ
#define FOLLOW __WASI_LOOKUPFLAGS_SYMLINK_FOLLOW

static __wasi_fd_t top;

static void told(const char *what, long long value) { printf("%s %lld\n", what, value); }

static void must(__wasi_errno_t error) {
  if (error) printf("unforeseen %d\n", error), exit(3);
}

static __wasi_fd_t opened(const char *path, __wasi_oflags_t flags) {
  __wasi_fd_t fd = 0;
  must(__wasi_path_open(top, FOLLOW, path, flags, READ | __WASI_RIGHTS_FD_READDIR | __WASI_RIGHTS_FD_SEEK | __WASI_RIGHTS_FD_TELL, READ, 0, &fd));
  return fd;
}

static void preopens(const char *wanted) {
  __wasi_prestat_t found;
  char name[256] = {0};
  for (__wasi_fd_t fd = 3; !__wasi_fd_prestat_get(fd, &found); fd++) {
    __wasi_size_t size = found.u.dir.pr_name_len;
    if (__wasi_fd_prestat_dir_name(fd, (uint8_t *)name, size)) continue;
    name[size] = 0;
    if (!strcmp(name, wanted)) top = fd;
  }
  told("prestat-found", top > 0);
  told("prestat-name-too-short", __wasi_fd_prestat_dir_name(top, (uint8_t *)name, 1));
  told("prestat-of-a-stream", __wasi_fd_prestat_get(0, &found));
  told("prestat-of-nothing", __wasi_fd_prestat_get(99, &found));
}

static void open_one(const char *what, __wasi_fd_t at, __wasi_lookupflags_t lookup, const char *path, __wasi_oflags_t flags) {
  __wasi_fd_t fd;
  __wasi_errno_t error = __wasi_path_open(at, lookup, path, flags, READ, 0, 0, &fd);
  if (!error) error = __wasi_fd_close(fd);
  printf("open-%s %d\n", what, error);
}

static void opens(void) {
  static char long_name[300];
  __wasi_fd_t file = opened("file", 0);
  memset(long_name, 'n', 256);
  open_one("file", top, FOLLOW, "file", 0);
  open_one("folder", top, FOLLOW, "dir", __WASI_OFLAGS_DIRECTORY);
  open_one("file-as-folder", top, FOLLOW, "file", __WASI_OFLAGS_DIRECTORY);
  open_one("missing", top, FOLLOW, "missing", 0);
  open_one("empty-name", top, FOLLOW, "", 0);
  open_one("long-name", top, FOLLOW, long_name, 0);
  open_one("below-a-file", top, FOLLOW, "file/x", 0);
  open_one("file-with-slash", top, FOLLOW, "file/", 0);
  open_one("folder-with-slash", top, FOLLOW, "dir/", 0);
  open_one("dot", top, FOLLOW, ".", __WASI_OFLAGS_DIRECTORY);
  open_one("there-and-back", top, FOLLOW, "dir/../file", 0);
  open_one("parent", top, FOLLOW, "..", 0);
  open_one("parent-of-parent", top, FOLLOW, "dir/../../etc", 0);
  open_one("absolute", top, FOLLOW, "/file", 0);
  open_one("link", top, FOLLOW, "link", 0);
  open_one("link-itself", top, 0, "link", 0);
  open_one("link-to-folder", top, FOLLOW, "dirlink/e07", 0);
  open_one("folder-link-itself-on-the-way", top, 0, "dirlink/e07", 0);
  open_one("dangling", top, FOLLOW, "dangling", 0);
  open_one("dangling-itself", top, 0, "dangling", 0);
  open_one("loop", top, FOLLOW, "loop", 0);
  open_one("loop-of-two", top, FOLLOW, "one", 0);
  open_one("loop-on-the-way", top, FOLLOW, "loop/x", 0);
  open_one("link-outside", top, FOLLOW, "outside", 0);
  open_one("absolute-link", top, FOLLOW, "absolute", 0);
  open_one("at-a-file", file, FOLLOW, "x", 0);
  open_one("at-nothing", 99, FOLLOW, "file", 0);
  must(__wasi_fd_close(file));
}

// Lists the folder through a buffer of `size`. Returns the number of entries, or -1 unless they are e00 to e49, . and
// .., each once.
static int list(__wasi_fd_t fd, __wasi_size_t size) {
  static uint8_t data[8192];
  int seen = 0, entries = 0;
  __wasi_dircookie_t cookie = 0;
  for (;;) {
    __wasi_size_t used, at = 0;
    if (__wasi_fd_readdir(fd, data, size, cookie, &used)) return -2;
    while (at + sizeof(__wasi_dirent_t) <= used) {
      __wasi_dirent_t each;
      memcpy(&each, data + at, sizeof each);
      if (at + sizeof each + each.d_namlen > used) break;
      const char *name = (const char *)data + at + sizeof each;
      seen += each.d_namlen == 3 && name[0] == 'e' ? (name[1] - '0') * 10 + name[2] - '0' : 1000;
      cookie = each.d_next, at += sizeof each + each.d_namlen, entries++;
    }
    if (used < size) break;
    if (at == 0) return -3;
  }
  return entries == 52 && seen == 49 * 50 / 2 + 2000 ? entries : -1;
}

static void readdirs(void) {
  uint8_t data[64];
  __wasi_size_t used;
  __wasi_fd_t dir = opened("dir", __WASI_OFLAGS_DIRECTORY), file = opened("file", 0);
  told("readdir-large", list(dir, 8192));
  told("readdir-again", list(dir, 4096));
  told("readdir-small", list(dir, 64));
  told("readdir-one-entry", list(dir, sizeof(__wasi_dirent_t) + 3));
  told("readdir-less-than-a-head", __wasi_fd_readdir(dir, data, 10, 0, &used));
  told("readdir-less-than-a-head-used", used);
  told("readdir-no-room", __wasi_fd_readdir(dir, data, 0, 0, &used));
  told("readdir-past-the-end", __wasi_fd_readdir(dir, data, 64, 1000, &used));
  told("readdir-past-the-end-used", used);
  told("readdir-of-a-file", __wasi_fd_readdir(file, data, 64, 0, &used));
  told("readdir-of-nothing", __wasi_fd_readdir(99, data, 64, 0, &used));
  must(__wasi_fd_close(dir)), must(__wasi_fd_close(file));
}

static void reads(void) {
  char one[5] = {0}, two[64] = {0};
  __wasi_iovec_t both[] = {{(uint8_t *)one, 4}, {(uint8_t *)two, sizeof two}}, none[] = {{(uint8_t *)one, 0}};
  __wasi_size_t count = 0;
  __wasi_filesize_t at = 0;
  __wasi_fd_t fd = opened("file", 0), dir = opened("dir", __WASI_OFLAGS_DIRECTORY);
  told("read-into-two", __wasi_fd_read(fd, both, 2, &count)), told("read-into-two-right", count >= 4 && !strcmp(one, "cont"));
  while (count) must(__wasi_fd_read(fd, both, 2, &count));
  told("tell", __wasi_fd_tell(fd, &at)), told("tell-at", at);
  told("seek-back", __wasi_fd_seek(fd, -3, __WASI_WHENCE_CUR, &at)), told("seek-back-at", at);
  told("seek-from-the-end", __wasi_fd_seek(fd, -2, __WASI_WHENCE_END, &at)), told("seek-from-the-end-at", at);
  told("seek-past-the-end", __wasi_fd_seek(fd, 1000, __WASI_WHENCE_SET, &at)), told("seek-past-the-end-at", at);
  told("read-past-the-end", __wasi_fd_read(fd, both, 2, &count)), told("read-past-the-end-count", count);
  told("seek-before-the-start", __wasi_fd_seek(fd, -1, __WASI_WHENCE_SET, &at));
  told("pread", __wasi_fd_pread(fd, both, 1, 2, &count)), told("pread-count", count), told("pread-right", !strncmp(one, "nten", 4));
  told("pread-moves-nothing", __wasi_fd_tell(fd, &at) || at != 1000);
  told("pread-past-the-end", __wasi_fd_pread(fd, both, 1, 4096, &count)), told("pread-past-the-end-count", count);
  told("read-nothing", __wasi_fd_read(fd, none, 1, &count)), told("read-nothing-count", count);
  told("read-of-a-folder", __wasi_fd_read(dir, both, 2, &count));
  told("seek-in-a-folder", __wasi_fd_seek(dir, 0, __WASI_WHENCE_CUR, &at));
  told("read-of-nothing", __wasi_fd_read(99, both, 2, &count));
  told("advise", __wasi_fd_advise(fd, 0, 8, __WASI_ADVICE_WILLNEED));
  told("sync", __wasi_fd_sync(fd)), told("datasync", __wasi_fd_datasync(fd));
  told("close", __wasi_fd_close(fd)), told("close-again", __wasi_fd_close(fd));
  told("read-closed", __wasi_fd_read(fd, both, 2, &count));
  must(__wasi_fd_close(dir));
}

static void stat_one(const char *what, __wasi_lookupflags_t lookup, const char *path) {
  __wasi_filestat_t found;
  __wasi_errno_t error = __wasi_path_filestat_get(top, lookup, path, &found);
  printf("stat-%s %d\n", what, error);
  if (!error) printf("stat-%s-type %d\n", what, found.filetype);
}

static void stats(void) {
  __wasi_filestat_t by_path, by_fd, other;
  __wasi_fdstat_t state;
  __wasi_fd_t fd = opened("file", 0), dir = opened("dir", __WASI_OFLAGS_DIRECTORY);
  stat_one("file", FOLLOW, "file"), stat_one("folder", FOLLOW, "dir"), stat_one("link", FOLLOW, "link"), stat_one("link-itself", 0, "link");
  stat_one("dangling", FOLLOW, "dangling"), stat_one("dangling-itself", 0, "dangling"), stat_one("loop", FOLLOW, "loop");
  stat_one("loop-itself", 0, "loop");
  stat_one("missing", FOLLOW, "missing"), stat_one("parent", FOLLOW, ".."), stat_one("outside", FOLLOW, "outside");
  told("filestat", __wasi_fd_filestat_get(fd, &by_fd)), told("filestat-size", by_fd.size), told("filestat-links", by_fd.nlink);
  must(__wasi_path_filestat_get(top, FOLLOW, "link", &by_path)), must(__wasi_path_filestat_get(top, FOLLOW, "empty", &other));
  told("filestat-same-inode", by_path.ino == by_fd.ino && by_path.dev == by_fd.dev), told("filestat-other-inode", other.ino != by_fd.ino);
  told("filestat-empty-size", other.size);
  told("filestat-of-nothing", __wasi_fd_filestat_get(99, &by_fd));
  told("fdstat", __wasi_fd_fdstat_get(fd, &state)), told("fdstat-type", state.fs_filetype);
  told("fdstat-may-write", (state.fs_rights_base & __WASI_RIGHTS_FD_WRITE) != 0);
  told("fdstat-folder", __wasi_fd_fdstat_get(dir, &state)), told("fdstat-folder-type", state.fs_filetype);
  told("fdstat-of-nothing", __wasi_fd_fdstat_get(99, &state));
  must(__wasi_fd_close(fd)), must(__wasi_fd_close(dir));
}

static void readlinks(void) {
  char data[64] = {0};
  __wasi_size_t used = 0;
  told("readlink", __wasi_path_readlink(top, "link", (uint8_t *)data, sizeof data, &used)), told("readlink-used", used);
  told("readlink-right", !strncmp(data, "file", 4));
  told("readlink-cut", __wasi_path_readlink(top, "link", (uint8_t *)data, 2, &used)), told("readlink-cut-used", used);
  told("readlink-dangling", __wasi_path_readlink(top, "dangling", (uint8_t *)data, sizeof data, &used));
  told("readlink-loop", __wasi_path_readlink(top, "loop", (uint8_t *)data, sizeof data, &used));
  told("readlink-of-a-file", __wasi_path_readlink(top, "file", (uint8_t *)data, sizeof data, &used));
  told("readlink-of-a-missing", __wasi_path_readlink(top, "missing", (uint8_t *)data, sizeof data, &used));
  told("readlink-outside", __wasi_path_readlink(top, "../x", (uint8_t *)data, sizeof data, &used));
  told("readlink-absolute", __wasi_path_readlink(top, "absolute", (uint8_t *)data, sizeof data, &used));
}

static void worlds(void) {
  __wasi_size_t count, size;
  __wasi_timestamp_t first = 0, second = 0;
  uint8_t one[16] = {0}, two[16] = {0}, data[512], *places[16];
  told("args-sizes", __wasi_args_sizes_get(&count, &size)), told("args-count", count), told("args-size", size);
  told("args", __wasi_args_get(places, data)), told("args-first", places[0] == data && !strcmp((char *)data, "guest"));
  told("environ-sizes", __wasi_environ_sizes_get(&count, &size)), told("environ-count", count), told("environ-size", size);
  told("environ", __wasi_environ_get(places, data)), told("environ-right", !strcmp((char *)places[0], "A=1"));
  told("clock-res", __wasi_clock_res_get(__WASI_CLOCKID_MONOTONIC, &first)), told("clock-res-set", first > 0);
  told("clock", __wasi_clock_time_get(__WASI_CLOCKID_MONOTONIC, 1, &first)), must(__wasi_clock_time_get(__WASI_CLOCKID_MONOTONIC, 1, &second));
  told("clock-goes-on", second >= first), told("clock-wall", __wasi_clock_time_get(__WASI_CLOCKID_REALTIME, 1, &first));
  told("random", __wasi_random_get(one, sizeof one));
  must(__wasi_random_get(two, sizeof two)), told("random-differs", memcmp(one, two, sizeof one) != 0);
  told("random-nothing", __wasi_random_get(one, 0));
  told("yield", __wasi_sched_yield());
  __wasi_subscription_t wait = {.userdata = 7, .u = {.tag = __WASI_EVENTTYPE_CLOCK, .u.clock = {.id = __WASI_CLOCKID_MONOTONIC, .timeout = 1000}}};
  __wasi_event_t event;
  told("poll", __wasi_poll_oneoff(&wait, &event, 1, &count)), told("poll-count", count), told("poll-userdata", event.userdata);
  told("poll-error", event.error), told("poll-type", event.type);
  told("poll-nothing", __wasi_poll_oneoff(&wait, &event, 0, &count));
  __wasi_fd_t fd = opened("file", 0), other = opened("empty", 0);
  told("renumber", __wasi_fd_renumber(fd, other)), told("renumber-gone", __wasi_fd_tell(fd, &first));
  told("renumber-there", __wasi_fd_tell(other, &first));
  told("renumber-nothing", __wasi_fd_renumber(99, other));
}

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  preopens(argv[1]), opens(), readdirs(), reads(), stats(), readlinks(), worlds();
  return 0;
}
