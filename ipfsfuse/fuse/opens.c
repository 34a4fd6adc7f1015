/* Opens and releases that Python is not asked about: those of inodes that Python allowed (device.py), for
 * reading. And what a directory's reader asks for after Python has given the last entry: whether there are
 * more, and the release.
 *
 * A request costs pyfuse3 45 us and more. A small file in the page cache needs two of them, and nothing
 * else; so does a directory whose listing is there. One that is listed for the first time needs four.
 * Concurrency: one lock for the table; any thread may call.
 */
#define _GNU_SOURCE
#include "device.h"

#include <fcntl.h>
#include <pthread.h>
#include <string.h>

#define ANSWERED_HERE (1ULL << 63) /* in a handle that was given here; the other bits are the inode's number */
#define SLOTS (1U << 16)
#define FULL (SLOTS / 2)
#define UNDRAINED 32               /* opens that Python does not know of yet; the next open is passed on to it. So with releases */
#define LISTINGS 1024
#define WRITING (O_WRONLY | O_RDWR | O_TRUNC | O_APPEND | O_CREAT)

static struct { uint64_t inode; uint32_t opens; } table[SLOTS];
static uint32_t used_slots;
static struct { uint64_t handle, end; } listings[LISTINGS]; /* whose end is known; at the place that the handle gives */
static struct undrained { uint64_t numbers[UNDRAINED]; uint32_t count; }
	opened,   /* inodes that were opened here, */
	released; /* and directories that were released here: Python does not know of it yet */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint32_t home(uint64_t inode) { return (uint32_t)((inode * 0x9E3779B97F4A7C15ULL) >> 48); }

/* The slot of `inode`, or the free slot where it belongs. */
static uint32_t slot_of(uint64_t inode)
{
	uint32_t slot = home(inode);

	while (table[slot].inode && table[slot].inode != inode)
		slot = (slot + 1) % SLOTS;
	return slot;
}

/* Frees `slot`, and moves up the entries that were pushed behind it. */
static void drop(uint32_t slot)
{
	uint32_t next = slot;

	used_slots--;
	for (;;) {
		table[slot].inode = 0;
		do {
			next = (next + 1) % SLOTS;
			if (!table[next].inode)
				return;
		} while ((next - home(table[next].inode)) % SLOTS < (next - slot) % SLOTS);
		table[slot] = table[next];
		slot = next;
	}
}

static void drop_idle(void)
{
	uint32_t slot = 0;

	while (slot < SLOTS)
		if (table[slot].inode && !table[slot].opens)
			drop(slot); /* look at this slot again: another entry may have moved up */
		else
			slot++;
}

/* From now on `inode` is opened for everyone who wants to read it. It must be a regular file whose attributes
 * the kernel already has as they are, or a directory that never changes. */
void opens_allow(uint64_t inode)
{
	uint32_t slot;

	pthread_mutex_lock(&lock);
	if (used_slots >= FULL)
		drop_idle();
	slot = slot_of(inode);
	if (!table[slot].inode && used_slots < FULL) {
		table[slot].inode = inode;
		table[slot].opens = 0;
		used_slots++;
	}
	pthread_mutex_unlock(&lock);
}

/* From now on Python is asked about `inode` again. Returns how many opens of it stand here; their releases go
 * to Python too. If there are any and `even_open` is 0, nothing changes. */
uint32_t opens_revoke(uint64_t inode, int even_open)
{
	uint32_t slot, opens = 0;

	pthread_mutex_lock(&lock);
	slot = slot_of(inode);
	if (table[slot].inode) {
		opens = table[slot].opens;
		if (!opens || even_open)
			drop(slot);
	}
	pthread_mutex_unlock(&lock);
	return opens;
}

/* As opens_revoke for every inode that is not open. */
void opens_revoke_idle(void)
{
	pthread_mutex_lock(&lock);
	drop_idle();
	pthread_mutex_unlock(&lock);
}

/* Call this when the device thread has stopped: the next session starts with an empty table. */
void opens_clear(void)
{
	memset(table, 0, sizeof table);
	used_slots = opened.count = released.count = 0;
	memset(listings, 0, sizeof listings);
}

static uint32_t drain(struct undrained *list, uint64_t *out)
{
	uint32_t count;

	pthread_mutex_lock(&lock);
	count = list->count;
	memcpy(out, list->numbers, count * sizeof *out);
	list->count = 0;
	pthread_mutex_unlock(&lock);
	return count;
}

/* Writes the inodes opened since the last call to `out`, which has room for UNDRAINED; returns how many. */
uint32_t opens_drain(uint64_t *out) { return drain(&opened, out); }

/* The same with the handles of directories that were released. */
uint32_t opens_released(uint64_t *out) { return drain(&released, out); }

static int answer_open(int device, const struct fuse_in_header *request, const struct fuse_open_in *how)
{
	struct fuse_open_out answer = {.fh = ANSWERED_HERE | request->nodeid, .open_flags = FOPEN_KEEP_CACHE};
	uint32_t slot = slot_of(request->nodeid);
	enum reply reply;

	if (request->opcode == FUSE_OPENDIR)
		answer.open_flags |= FOPEN_CACHE_DIR;
	if (how->flags & WRITING || !table[slot].inode || opened.count == UNDRAINED)
		return 0;
	reply = reply_send(device, request->unique, &answer, sizeof answer);
	if (reply == REPLY_SENT) { /* only then will a RELEASE come */
		table[slot].opens++;
		opened.numbers[opened.count++] = request->nodeid;
	}
	return reply != REPLY_FAILED;
}

static int answer_release(int device, const struct fuse_in_header *request, const struct fuse_release_in *what)
{
	uint32_t slot = slot_of(request->nodeid);

	if (!(what->fh & ANSWERED_HERE) || !table[slot].inode || !table[slot].opens)
		return 0;
	table[slot].opens--; /* the file is closed, whatever becomes of the answer */
	return reply_send(device, request->unique, NULL, 0) != REPLY_FAILED;
}

/* The last entry of the open directory `handle` has the offset `end`. That may be forgotten. */
void opens_end(uint64_t handle, uint64_t end)
{
	pthread_mutex_lock(&lock);
	listings[handle % LISTINGS].handle = handle;
	listings[handle % LISTINGS].end = end;
	pthread_mutex_unlock(&lock);
}

static int answer_readdir(int device, const struct fuse_in_header *request, const struct fuse_read_in *what)
{
	uint32_t place = what->fh % LISTINGS;

	return what->fh && listings[place].handle == what->fh && listings[place].end == what->offset &&
	       reply_send(device, request->unique, NULL, 0) != REPLY_FAILED;
}

static int answer_releasedir(int device, const struct fuse_in_header *request, const struct fuse_release_in *what)
{
	uint32_t place = what->fh % LISTINGS;

	if (what->fh & ANSWERED_HERE)
		return answer_release(device, request, what);
	if (!what->fh || listings[place].handle != what->fh || released.count == UNDRAINED)
		return 0;
	if (reply_send(device, request->unique, NULL, 0) == REPLY_FAILED)
		return 0;
	listings[place].handle = 0;
	released.numbers[released.count++] = what->fh;
	return 1;
}

int opens_answer(int device, const struct fuse_in_header *request, size_t size)
{
	const void *body = request + 1;
	int done = 0;

	pthread_mutex_lock(&lock);
	if ((request->opcode == FUSE_OPEN || request->opcode == FUSE_OPENDIR) && size >= sizeof *request + sizeof(struct fuse_open_in))
		done = answer_open(device, request, body);
	else if (request->opcode == FUSE_RELEASE && size >= sizeof *request + sizeof(struct fuse_release_in))
		done = answer_release(device, request, body);
	else if ((request->opcode == FUSE_READDIR || request->opcode == FUSE_READDIRPLUS) &&
		 size >= sizeof *request + sizeof(struct fuse_read_in))
		done = answer_readdir(device, request, body);
	else if (request->opcode == FUSE_RELEASEDIR && size >= sizeof *request + sizeof(struct fuse_release_in))
		done = answer_releasedir(device, request, body);
	pthread_mutex_unlock(&lock);
	return done;
}
