/* Two calls of libfuse, extended by what pyfuse3 does not offer.
 *
 * device.py loads this library into the global scope before pyfuse3 is imported. The dynamic linker then
 * finds these functions before libfuse's own.
 */
#define _GNU_SOURCE
#define FUSE_USE_VERSION 31
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>

#define CACHE_LISTING (1ULL << 62) /* as in device.py: in a directory's handle */
#define NAME_ONLY UINT64_MAX       /* as in device.py: in an entry's generation */

/* A directory whose handle has the bit CACHE_LISTING never changes: the kernel may keep its listing
 * (FOPEN_CACHE_DIR). */
int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *info)
{
	static int (*next)(fuse_req_t, const struct fuse_file_info *);
	struct fuse_file_info changed = *info;

	if (!next)
		next = (int (*)(fuse_req_t, const struct fuse_file_info *))dlsym(RTLD_NEXT, "fuse_reply_open");
	if (!next)
		return fuse_reply_err(request, ENOSYS);
	if (changed.fh & CACHE_LISTING)
		changed.cache_readdir = changed.keep_cache = 1;
	return next(request, &changed);
}

/* An entry whose generation is NAME_ONLY goes out with node id 0. pyfuse3 has one field for the node id and
 * for d_ino, and d_ino must not be 0: the C library skips such entries.
 *
 * The kernel (fs/fuse/readdir.c, fuse_direntplus_link) takes an entry with node id 0 as a name and a type,
 * and counts no reference. If it gets a node id with attributes that it rejects, it sends a FORGET for a
 * reference that nobody counted. */
size_t fuse_add_direntry_plus(fuse_req_t request, char *buffer, size_t room, const char *name,
			      const struct fuse_entry_param *entry, off_t offset)
{
	static size_t (*next)(fuse_req_t, char *, size_t, const char *, const struct fuse_entry_param *, off_t);
	struct fuse_entry_param changed = *entry;

	if (!next)
		next = (size_t (*)(fuse_req_t, char *, size_t, const char *, const struct fuse_entry_param *, off_t))
			dlsym(RTLD_NEXT, "fuse_add_direntry_plus");
	if (!next)
		return room + 1; /* "does not fit" */
	if (changed.generation == NAME_ONLY)
		changed.ino = changed.generation = 0;
	return next(request, buffer, room, name, &changed, offset);
}
