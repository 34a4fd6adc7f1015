// Prints the SHA-256 of a tree, and the number of its entries. Hashed are the path, the kind, the size and the
// content of each entry, in the order of names.
// Usage: digest DIR
#include <dirent.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static uint32_t state[8], constants[64];
static uint8_t block[64];
static uint64_t taken;

// FIPS 180-4: the first 32 bits of the fractions of the square and cube roots of the first primes. Computed with
// integers only.
static uint32_t fraction(unsigned prime, int power) {
  unsigned __int128 low = 0, high = (unsigned __int128)1 << 36, wanted = prime;
  wanted <<= 32 * power;
  while (low + 1 < high) {
    unsigned __int128 middle = (low + high) / 2, raised = middle * middle;
    if (power == 3) raised *= middle;
    if (raised <= wanted) low = middle;
    else high = middle;
  }
  return (uint32_t)low;
}

static void begin(void) {
  int count = 0;
  for (unsigned number = 2; count < 64; number++) {
    unsigned factor = 2;
    while (number % factor) factor++;
    if (factor != number) continue;
    if (count < 8) state[count] = fraction(number, 2);
    constants[count++] = fraction(number, 3);
  }
}

static uint32_t turn(uint32_t word, int by) { return word >> by | word << (32 - by); }

static void compress(void) {
  uint32_t w[64], s[8];
  memcpy(s, state, sizeof s);
  for (int i = 0; i < 16; i++) w[i] = (uint32_t)block[4 * i] << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
  for (int i = 16; i < 64; i++) {
    uint32_t one = turn(w[i - 15], 7) ^ turn(w[i - 15], 18) ^ w[i - 15] >> 3, two = turn(w[i - 2], 17) ^ turn(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + one + w[i - 7] + two;
  }
  for (int i = 0; i < 64; i++) {
    uint32_t one = s[7] + (turn(s[4], 6) ^ turn(s[4], 11) ^ turn(s[4], 25)) + ((s[4] & s[5]) ^ (~s[4] & s[6])) + constants[i] + w[i];
    uint32_t two = (turn(s[0], 2) ^ turn(s[0], 13) ^ turn(s[0], 22)) + ((s[0] & s[1]) ^ (s[0] & s[2]) ^ (s[1] & s[2]));
    memmove(s + 1, s, 7 * sizeof *s);
    s[4] += one;
    s[0] = one + two;
  }
  for (int i = 0; i < 8; i++) state[i] += s[i];
}

static void take(const void *data, size_t size) {
  for (const uint8_t *each = data; size;) {
    size_t at = taken % 64, count = size < 64 - at ? size : 64 - at;
    memcpy(block + at, each, count);
    taken += count, each += count, size -= count;
    if (taken % 64 == 0) compress();
  }
}

static void end(void) {
  uint64_t bits = taken * 8;
  take("\x80", 1);
  while (taken % 64 != 56) take("", 1);
  for (int shift = 56; shift >= 0; shift -= 8) take(&(uint8_t){bits >> shift}, 1);
  for (int i = 0; i < 8; i++) printf("%08x", state[i]);
}

static long things;

static void stop(const char *path) { perror(path), exit(1); }

static void file(const char *path) {
  static char data[1 << 16];
  int fd = open(path, O_RDONLY);
  ssize_t count = -1;
  if (fd < 0) stop(path);
  while ((count = read(fd, data, sizeof data)) > 0) take(data, count);
  if (count < 0) stop(path);
  close(fd);
}

static void folder(const char *path, size_t top);

static void thing(const char *path, size_t top) {
  struct stat found;
  char said[64], target[4096];
  if (lstat(path, &found)) stop(path);
  things++;
  take(path + top, strlen(path + top) + 1);
  if (S_ISDIR(found.st_mode)) {
    take("directory", 10);
    folder(path, top);
  } else if (S_ISLNK(found.st_mode)) {
    ssize_t count = readlink(path, target, sizeof target);
    if (count < 0) stop(path);
    take("symlink", 8), take(target, count);
  } else {
    take(said, snprintf(said, sizeof said, "file %lld", (long long)found.st_size) + 1);
    file(path);
  }
}

static int ordered(const void *left, const void *right) { return strcmp(*(char *const *)left, *(char *const *)right); }

static void folder(const char *path, size_t top) {
  size_t count = 0, room = 0;
  char **names = NULL;
  DIR *dir = opendir(path);
  if (!dir) stop(path);
  for (struct dirent *each; (each = readdir(dir));) {
    if (!strcmp(each->d_name, ".") || !strcmp(each->d_name, "..")) continue;
    if (count == room) names = realloc(names, (room = room * 2 + 16) * sizeof *names);
    names[count++] = strdup(each->d_name);
  }
  closedir(dir);
  qsort(names, count, sizeof *names, ordered);
  for (size_t i = 0; i < count; i++) {
    char *below = malloc(strlen(path) + strlen(names[i]) + 2);
    sprintf(below, "%s/%s", path, names[i]);
    thing(below, top);
    free(below), free(names[i]);
  }
  free(names);
}

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  begin();
  folder(argv[1], strlen(argv[1]) + 1);
  end();
  printf(" %ld\n", things);
  return 0;
}
