// Tries every call of preview 1 that would change something below /ipfs. Prints how each ended as a line
// "NAME ERRNO".
// Usage: writes FILE DIR. Both are relative to /ipfs.
#include <stdio.h>
#include <string.h>
#include <wasi/api.h>

static void told(const char *name, __wasi_errno_t error) { printf("%s %d\n", name, error); }

static __wasi_fd_t ipfs(void) {
  for (__wasi_fd_t fd = 3;; fd++) {
    __wasi_prestat_t found;
    char name[64] = {0};
    if (__wasi_fd_prestat_get(fd, &found)) return 0;
    if (found.u.dir.pr_name_len < sizeof name && !__wasi_fd_prestat_dir_name(fd, (uint8_t *)name, found.u.dir.pr_name_len) && !strcmp(name, "/ipfs"))
      return fd;
  }
}

int main(int argc, char **argv) {
  if (argc != 3) return 2;
  const char *file = argv[1], *dir = argv[2];
  char new[256], other[256];
  snprintf(new, sizeof new, "%s/new", dir);
  snprintf(other, sizeof other, "%s/other", dir);
  __wasi_fd_t root = ipfs(), fd;
  __wasi_rights_t read = __WASI_RIGHTS_FD_READ, write = __WASI_RIGHTS_FD_WRITE;
  __wasi_size_t count;
  __wasi_ciovec_t data = {(const uint8_t *)"x", 1};

  told("open-write", __wasi_path_open(root, 1, file, 0, write, 0, 0, &fd));
  told("open-read-write", __wasi_path_open(root, 1, file, 0, read | write, 0, 0, &fd));
  told("open-append", __wasi_path_open(root, 1, file, 0, write, 0, __WASI_FDFLAGS_APPEND, &fd));
  told("open-create", __wasi_path_open(root, 1, new, __WASI_OFLAGS_CREAT, read, 0, 0, &fd));
  told("open-create-write", __wasi_path_open(root, 1, new, __WASI_OFLAGS_CREAT, write, 0, 0, &fd));
  told("open-exclusive", __wasi_path_open(root, 1, new, __WASI_OFLAGS_CREAT | __WASI_OFLAGS_EXCL, write, 0, 0, &fd));
  told("open-truncate", __wasi_path_open(root, 1, file, __WASI_OFLAGS_TRUNC, write, 0, 0, &fd));
  told("path_create_directory", __wasi_path_create_directory(root, new));
  told("path_remove_directory", __wasi_path_remove_directory(root, dir));
  told("path_unlink_file", __wasi_path_unlink_file(root, file));
  told("path_rename", __wasi_path_rename(root, file, root, new));
  told("path_link", __wasi_path_link(root, 0, file, root, new));
  told("path_symlink", __wasi_path_symlink(file, root, other));
  told("path_filestat_set_times", __wasi_path_filestat_set_times(root, 1, file, 1, 1, __WASI_FSTFLAGS_MTIM));

  if (__wasi_path_open(root, 1, file, 0, read, 0, 0, &fd)) return 3;
  told("fd_filestat_set_size", __wasi_fd_filestat_set_size(fd, 0));
  told("fd_filestat_set_times", __wasi_fd_filestat_set_times(fd, 1, 1, __WASI_FSTFLAGS_MTIM));
  told("fd_write", __wasi_fd_write(fd, &data, 1, &count));
  told("fd_pwrite", __wasi_fd_pwrite(fd, &data, 1, 0, &count));
  told("fd_allocate", __wasi_fd_allocate(fd, 0, 4096));
  return 0;
}
