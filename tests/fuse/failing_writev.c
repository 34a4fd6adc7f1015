/* For LD_PRELOAD: makes writev fail if our C code calls it. With FAILING_WRITEV=ERRNO:TIMES:EVERYWHERE one call
 * passes after TIMES failures, and so on. If EVERYWHERE is 0, calls of the main thread don't fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_ulong calls;

ssize_t writev(int file, const struct iovec *parts, int count)
{
	static ssize_t (*next)(int, const struct iovec *, int);
	const char *plan = getenv("FAILING_WRITEV");
	Dl_info caller;
	char *colon;

	if (!next)
		next = (ssize_t (*)(int, const struct iovec *, int))dlsym(RTLD_NEXT, "writev");
	if (plan && dladdr(__builtin_return_address(0), &caller) && strstr(caller.dli_fname, "ipfsfuse/fuse/_native")) {
		long number = strtol(plan, &colon, 10), times = strtol(colon + 1, &colon, 10);

		if ((colon[1] != '0' || gettid() != getpid()) && (long)(calls++ % (times + 1)) < times) {
			errno = (int)number;
			return -1;
		}
	}
	return next(file, parts, count);
}

unsigned long failing_writev_calls(void) { return calls; }
