/* Writes replies to /dev/fuse: our own, and those of libfuse, extended by features that libfuse or pyfuse3
 * does not offer.
 *
 * A reply contains the number of its request, but not the opcode. So libfuse gets each request with its
 * opcode in the highest byte of `unique`, which the kernel's numbers do not reach.
 */
#include "device.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>
#include <unistd.h>

#define OPCODE_SHIFT 56
#define UNIQUE ((1ULL << OPCODE_SHIFT) - 1)
#define OUR_TRIES 6                /* tries to get memory, after 1, 2, 4, ... 32 ms; then Python may answer */
#define LIBFUSE_TRIES 100          /* the same, with pauses of up to 64 ms: nothing else will answer */
#define BODY_PARTS 64

#define CACHE_LISTING (1ULL << 62) /* as in device.py: in a directory's handle */
#define PASSTHROUGH (1ULL << 61)   /* as in device.py: in a file's handle, whose lower 31 bits are then a backing id */
#define NAME_ONLY UINT64_MAX       /* as in device.py: in an entry's generation */

/* INIT. With libfuse's 12 background requests, 12 stalled reads would stop the mount. Writes never get here:
 * their size limit only bounds how many FORGETs come in one request. */
#define MAX_BACKGROUND 4096
#define CONGESTION 3072
#define MAX_WRITE (128U << 10)

/* As in device.py */
#define INIT_DONE 1
#define INIT_PARALLEL 2
#define INIT_PASSTHROUGH 4

/* From protocol 7.40; headers may be older. max_stack_depth is the first unused word after flags2, and
 * backing_id is the padding of struct fuse_open_out. With a depth of 1, backing files may not be on an
 * overlay, but an overlay may use this mount: the kernel allows a depth of two. */
#define OPEN_PASSTHROUGH (1 << 7)
#define FLAGS2_PASSTHROUGH (1U << 5)
#define MAX_STACK_DEPTH 1

static uint32_t offered, offered2;
static int with_readahead, with_passthrough;
static atomic_int init_result;

/* For the meaning of a failed write see fs/fuse/dev.c, fuse_dev_do_write. It fails with ENOENT if the request
 * is over. It may fail with ENOMEM before it has looked for the request, which then still waits. If it has
 * found the request but can't copy the reply, it ends the request with EIO: then another try finds no
 * request. */
static ssize_t write_parts(int device, const struct iovec *parts, int count, int tries)
{
	ssize_t written;
	useconds_t wait = 1000;

	while ((written = writev(device, parts, count)) < 0)
		if (errno == ENOMEM && tries--) {
			usleep(wait);
			if (wait < 64000)
				wait *= 2;
		} else if (errno != EINTR)
			break;
	return written;
}

enum reply reply_send_parts(int device, uint64_t unique, const struct iovec *body, int count)
{
	struct fuse_out_header header = {.len = sizeof header, .unique = unique};
	struct iovec parts[1 + BODY_PARTS] = {{&header, sizeof header}};

	for (int each = 0; each < count; each++) {
		parts[1 + each] = body[each];
		header.len += body[each].iov_len;
	}
	if (write_parts(device, parts, 1 + count, OUR_TRIES) >= 0)
		return REPLY_SENT;
	return errno == ENOMEM ? REPLY_FAILED : REPLY_GONE;
}

enum reply reply_send(int device, uint64_t unique, const void *body, size_t size)
{
	struct iovec part = {(void *)body, size};

	return reply_send_parts(device, unique, &part, size > 0);
}

int reply_store(int device, uint64_t inode, const void *content, uint32_t size)
{
	struct fuse_notify_store_out store = {.nodeid = inode, .size = size};
	struct fuse_out_header header = {.len = sizeof header + sizeof store + size, .error = FUSE_NOTIFY_STORE};
	struct iovec parts[] = {{&header, sizeof header}, {&store, sizeof store}, {(void *)content, size}};

	return write_parts(device, parts, 3, 0) >= 0;
}

void reply_prepare(int readahead, int passthrough)
{
	with_readahead = readahead;
	with_passthrough = passthrough;
	init_result = 0;
	offered = offered2 = 0;
}

int reply_init_result(void) { return init_result; }

size_t reply_expect(struct fuse_in_header *request, size_t size)
{
	const struct fuse_init_in *init = (const void *)(request + 1);

	if (request->opcode == FUSE_INIT && size >= sizeof *request + offsetof(struct fuse_init_in, flags2))
		offered = init->flags;
	if (request->opcode == FUSE_INIT && size >= sizeof *request + sizeof *init && offered & FUSE_INIT_EXT)
		offered2 = init->flags2;
	request->unique |= (uint64_t)request->opcode << OPCODE_SHIFT;
	return size;
}

/* Sets the word after `word`. Headers of Linux 6.9 and later have names for these words; in older ones they
 * are padding or unused. */
static void set_behind(uint32_t *word, uint32_t value)
{
	memcpy((char *)word + sizeof *word, &value, sizeof value);
}

/* libfuse before 3.17 does not ask for parallel directory operations, and no libfuse asks for cached symlinks
 * unless pyfuse3 does. */
static void extend_init(struct fuse_init_out *out, size_t size)
{
	if (with_passthrough && size >= sizeof *out && offered2 & FLAGS2_PASSTHROUGH) {
		out->flags |= FUSE_INIT_EXT;
		out->flags2 |= FLAGS2_PASSTHROUGH;
		set_behind(&out->flags2, MAX_STACK_DEPTH); /* max_stack_depth */
	} else {
		offered2 = 0;
	}
	out->flags |= offered & (FUSE_PARALLEL_DIROPS | FUSE_CACHE_SYMLINKS);
	if (!with_readahead)
		out->max_readahead = 0;
	out->max_background = MAX_BACKGROUND;
	out->congestion_threshold = CONGESTION;
	if (out->max_write > MAX_WRITE)
		out->max_write = MAX_WRITE;
}

/* Sends entries with the generation NAME_ONLY with node id 0. pyfuse3 has one field for the node id and for
 * d_ino, and d_ino must not be 0: the C library skips such entries.
 *
 * The kernel (fs/fuse/readdir.c, fuse_direntplus_link) takes only name and type from an entry with node id 0,
 * and counts no reference. If it gets a node id with attributes that it rejects, it sends a FORGET for a
 * reference that was never counted. */
static void extend_listing(char *bytes, size_t size)
{
	while (size >= FUSE_NAME_OFFSET_DIRENTPLUS) {
		struct fuse_direntplus *entry = (void *)bytes;
		size_t length = FUSE_DIRENTPLUS_SIZE(entry);

		if (entry->entry_out.generation == NAME_ONLY)
			entry->entry_out.nodeid = entry->entry_out.generation = 0;
		if (length > size)
			return;
		bytes += length;
		size -= length;
	}
}

static void extend(uint32_t opcode, void *body, size_t size)
{
	struct fuse_open_out *opened = body;

	if (opcode == FUSE_INIT && size >= offsetof(struct fuse_init_out, time_gran))
		extend_init(body, size);
	else if (opcode == FUSE_READDIRPLUS)
		extend_listing(body, size);
	else if (opcode == FUSE_OPENDIR && size >= sizeof *opened && opened->fh & CACHE_LISTING)
		/* a directory that never changes: the kernel may keep its listing */
		opened->open_flags |= FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE;
	else if (opcode == FUSE_OPEN && size >= sizeof *opened && opened->fh & PASSTHROUGH) {
		/* the kernel (fs/fuse/iomode.c) accepts none of our other flags together with this one */
		opened->open_flags = OPEN_PASSTHROUGH;
		set_behind(&opened->open_flags, opened->fh & INT32_MAX); /* backing_id */
	}
}

ssize_t reply_from_libfuse(int device, struct iovec *parts, int count)
{
	struct fuse_out_header *header = parts[0].iov_base;
	uint32_t opcode = header->unique >> OPCODE_SHIFT;
	ssize_t written;

	header->unique &= UNIQUE;
	if (count == 2 && !header->error)
		extend(opcode, parts[1].iov_base, parts[1].iov_len);
	written = write_parts(device, parts, count, LIBFUSE_TRIES);
	if (opcode == FUSE_INIT)
		init_result = header->error ? header->error
			    : written < 0 ? -errno
			    : INIT_DONE | (offered & FUSE_PARALLEL_DIROPS ? INIT_PARALLEL : 0) |
			      (offered2 & FLAGS2_PASSTHROUGH ? INIT_PASSTHROUGH : 0);
	return written;
}
