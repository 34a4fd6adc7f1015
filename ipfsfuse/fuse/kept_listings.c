/* The one call of libfuse that pyfuse3 does not offer: telling the kernel to keep a directory's listing.
 *
 * Loaded into the global scope before pyfuse3 (see kernellists.py), this fuse_reply_open stands in front of libfuse's.
 * A handle with the bit KEPT is a directory whose listing never changes: the kernel may keep it and answer alone.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 31
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>

#define KEPT (1ULL << 62)

int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *info)
{
	static int (*next)(fuse_req_t, const struct fuse_file_info *);
	struct fuse_file_info told = *info;

	if (!next)
		next = (int (*)(fuse_req_t, const struct fuse_file_info *))dlsym(RTLD_NEXT, "fuse_reply_open");
	if (!next)
		return fuse_reply_err(request, ENOSYS);
	if (told.fh & KEPT)
		told.cache_readdir = told.keep_cache = 1;
	return next(request, &told);
}
