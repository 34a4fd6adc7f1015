/* Whole small files, and what the disk says of files, many in one call: each by itself would take and give back Python's lock,
 * for a whole file four times, and while another thread wants it that costs more than the reading. Knows nothing of Python. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <string.h>
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

/* What stat(2) says of files in the open folder `folder`. `names` has `count` names, one behind the other, each with a 0 at its
 * end. `out` gets seven numbers for each: errno (0 for none), mode, links, user, bytes, blocks of 512 bytes, and nanoseconds
 * since 1970 of the last change. Links are not followed. */
void stat_files(int folder, const char *names, int count, int64_t *out)
{
	struct stat info;

	for (; count; count--, names += strlen(names) + 1, out += 7) {
		out[0] = fstatat(folder, names, &info, AT_SYMLINK_NOFOLLOW) ? errno : 0;
		if (out[0])
			continue;
		out[1] = info.st_mode;
		out[2] = info.st_nlink;
		out[3] = info.st_uid;
		out[4] = info.st_size;
		out[5] = info.st_blocks;
		out[6] = info.st_mtim.tv_sec * 1000000000LL + info.st_mtim.tv_nsec;
	}
}
