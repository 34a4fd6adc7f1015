/* For LD_PRELOAD: if a read of a staging file may wait for the disk, it waits until the file HANGING_READ exists. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_int hanging;

ssize_t preadv64v2(int file, const struct iovec *parts, int count, off_t offset, int flags)
{
	static ssize_t (*next)(int, const struct iovec *, int, off_t, int);
	const char *until = getenv("HANGING_READ");
	Dl_info caller;

	if (!next)
		next = (ssize_t (*)(int, const struct iovec *, int, off_t, int))dlsym(RTLD_NEXT, "preadv64v2");
	if (until && !flags && dladdr(__builtin_return_address(0), &caller) && strstr(caller.dli_fname, "ipfsfuse/fuse/_native")) {
		hanging++;
		while (access(until, F_OK))
			usleep(10000);
		hanging--;
	}
	return next(file, parts, count, offset, flags);
}

int hanging_reads(void) { return hanging; }
