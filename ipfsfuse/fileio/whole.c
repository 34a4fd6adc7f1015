/* Whole small files, many in one call: each by itself would take and give back Python's lock four times, and while another
 * thread wants it that costs more than the reading. Knows nothing of Python. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <sys/stat.h>
#include <unistd.h>

#define NO_ROOM -2

/* Of one file. A pipe must not be waited for, hence O_NONBLOCK. */
static int64_t whole(const char *path, char *room, int64_t size)
{
	struct stat info;
	int64_t got = -1;
	int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);

	if (file < 0)
		return -1;
	if (!fstat(file, &info) && S_ISREG(info.st_mode)) {
		if (info.st_size > size)
			got = NO_ROOM;
		else if (pread(file, room, info.st_size, 0) == info.st_size)
			got = info.st_size;
	}
	close(file);
	return got;
}

/* Reads the files that `paths` name, one behind the other, into `room`, which has `size` bytes, until one finds no room that is
 * left; returns how many were looked at. `lengths` gets that of each, less than 0 where there is no such regular file, where it can't be
 * read, or where it would not fit in all of the room. */
int whole_files(const char *const *paths, int count, char *room, int64_t size, int64_t *lengths)
{
	int64_t at = 0;
	int each;

	for (each = 0; each < count; each++) {
		lengths[each] = whole(paths[each], room + at, size - at);
		if (lengths[each] == NO_ROOM && at)
			break;
		if (lengths[each] > 0)
			at += lengths[each];
	}
	return each;
}
