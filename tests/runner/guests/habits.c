// Does what the tests need of a command. Usage: habits WHAT [ARG...]
#include <alloca.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static int list(const char *path) {
  DIR *dir = opendir(path);
  if (!dir) return printf("errno %d\n", errno), 1;
  for (struct dirent *each; (each = readdir(dir));)
    if (each->d_name[0] != '.') puts(each->d_name);
  return 0;
}

static int copy(int from, long most) {
  char data[65536];
  ssize_t count = 0;
  for (; most > 0 && (count = read(from, data, sizeof data)) > 0; most -= count) fwrite(data, 1, count, stdout);
  return count < 0;
}

static int fill(const char *path, long size) {
  int file = open(path, O_WRONLY | O_CREAT, 0600);
  char data[65536] = {1};
  for (ssize_t count; size > 0; size -= count)
    if ((count = write(file, data, size < (long)sizeof data ? size : (long)sizeof data)) < 0) return 1;
  return close(file);
}

static const char *named(const char *folder, int number) {
  static char path[200];
  snprintf(path, sizeof path, "%s/%d", folder, number);
  return path;
}

static int nest(int at) {  // nests folders, then waits until the runner ends it
  char name[201];
  memset(name, 'n', 200), name[200] = 0;
  for (int depth = 0; depth < 40; depth++) {
    if (mkdirat(at, name, 0700)) return 1;
    int below = openat(at, name, O_RDONLY | O_DIRECTORY);
    close(at), at = below;
  }
  for (;;) sleep(1);
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  if (!strcmp(what, "args")) for (int i = 0; i < argc; i++) puts(argv[i]);
  else if (!strcmp(what, "env")) for (char **each = environ; *each; each++) puts(*each);
  else if (!strcmp(what, "ls")) return list(argv[2]);
  else if (!strcmp(what, "cat")) return copy(argc > 2 ? open(argv[2], O_RDONLY) : 0, argc > 3 ? atol(argv[3]) : LONG_MAX);
  else if (!strcmp(what, "insist")) for (;;) copy(open(argv[2], O_RDONLY), LONG_MAX);
  else if (!strcmp(what, "exit")) exit(atoi(argv[2]));
  else if (!strcmp(what, "err")) fputs("to stderr\n", stderr);
  else if (!strcmp(what, "abort")) abort();
  else if (!strcmp(what, "sleep")) puts("sleeping"), fflush(stdout), sleep(1000);
  else if (!strcmp(what, "spin")) {
    if (argc > 2 && copy(open(argv[2], O_RDONLY), LONG_MAX)) return 1;
    puts("spinning"), fflush(stdout);
    for (volatile int i = 0;; i++);
  }
  else if (!strcmp(what, "alloc")) return malloc(atol(argv[2])) ? 0 : 9;
  else if (!strcmp(what, "chance")) { unsigned long long r; getentropy(&r, sizeof r); printf("%lld %llu\n", (long long)time(0), r); }
  else if (!strcmp(what, "write")) return fputs("written\n", fopen(argv[2], "w")) < 0;
  else if (!strcmp(what, "flood")) for (long left = atol(argv[2]); left > 0; left -= 1000) printf("%*d\n", 999, 0);
  else if (!strcmp(what, "fill")) return fill(argv[2], atol(argv[3]));
  else if (!strcmp(what, "fill-then-sleep")) fill(argv[2], atol(argv[3])), puts("sleeping"), fflush(stdout), sleep(1000);
  else if (!strcmp(what, "fill-when")) {
    for (puts("waiting"), fflush(stdout); access(argv[2], F_OK);) usleep(10000);
    return fill(argv[3], atol(argv[4]));
  }
  else if (!strcmp(what, "twice")) return fill(argv[2], atol(argv[4])) || fill(argv[3], atol(argv[4]));
  else if (!strcmp(what, "fills")) { for (int i = 0;; i++) if (fill(named(argv[2], i), 100000)) return 1; }
  else if (!strcmp(what, "names")) {
    for (int i = 0; argc < 4 || i < atoi(argv[3]); i++) if (fill(named(argv[2], i), argc > 3)) return 1;
  }
  else if (!strcmp(what, "folders")) return nest(open(argv[2], O_RDONLY | O_DIRECTORY));
  else if (!strcmp(what, "open")) { int n = 0; while (open(argv[2], O_RDONLY) >= 0) n++; printf("%d errno %d\n", n, errno); }
  else if (!strcmp(what, "deep")) { volatile char *here = alloca(64); here[0] = 1; return main(argc, argv) + here[0]; }
  else return 2;
  return 0;
}
