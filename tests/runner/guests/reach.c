// Opens each argument for reading, below the preopen that it begins with. Prints its content, or "errno N".
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <unistd.h>

int main(int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    char data[4096];
    int fd = open(argv[i], O_RDONLY);
    ssize_t count = fd < 0 ? -1 : read(fd, data, sizeof data);
    if (count < 0) printf("%s: errno %d\n", argv[i], errno);
    else printf("%s: %.*s\n", argv[i], (int)count, data);
  }
  return 0;
}
