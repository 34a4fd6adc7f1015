/* Opens and releases that need nobody: of inodes that Python has made known (porter.py), for reading.
 *
 * A request costs pyfuse3 some 45 us and more, and a small file that is in the page cache two of them: that was all that was
 * left of it. Concurrency: one lock for the table; any thread.
 */
#define _GNU_SOURCE
#include "porter.h"

#include <fcntl.h>
#include <pthread.h>
#include <string.h>

#define OURS (1ULL << 63)        /* a handle given here: the rest of it is the inode */
#define SLOTS (1U << 16)
#define FULL (SLOTS / 2)
#define PACE 32                  /* opens in a row that Python need not hear of at once: the next one goes to it */
#define WRITING (O_WRONLY | O_RDWR | O_TRUNC | O_APPEND | O_CREAT)

static struct { uint64_t inode; uint32_t opens; } table[SLOTS];
static uint32_t held;
static uint64_t heard[PACE];
static uint32_t unheard;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static uint32_t home(uint64_t inode) { return (uint32_t)((inode * 0x9E3779B97F4A7C15ULL) >> 48); }

/* The slot of `inode`, or the free one where it belongs. */
static uint32_t slot_of(uint64_t inode)
{
	uint32_t slot = home(inode);

	while (table[slot].inode && table[slot].inode != inode)
		slot = (slot + 1) % SLOTS;
	return slot;
}

/* Frees `slot`, and moves up what was pushed behind it. */
static void drop(uint32_t slot)
{
	uint32_t next = slot;

	held--;
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
			drop(slot); /* what moved up is looked at again */
		else
			slot++;
}

/* `inode`, a regular file whose attributes the kernel was told rightly, may be opened by whoever asks. */
void opens_know(uint64_t inode)
{
	uint32_t slot;

	pthread_mutex_lock(&lock);
	if (held >= FULL)
		drop_idle();
	slot = slot_of(inode);
	if (!table[slot].inode && held < FULL) {
		table[slot].inode = inode;
		table[slot].opens = 0;
		held++;
	}
	pthread_mutex_unlock(&lock);
}

/* From now on Python is asked again; returns how often `inode` is open. If it is, and not `even_open`, nothing changes. */
uint32_t opens_dismiss(uint64_t inode, int even_open)
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

/* As opens_dismiss for everything that is not open. */
void opens_dismiss_idle(void)
{
	pthread_mutex_lock(&lock);
	drop_idle();
	pthread_mutex_unlock(&lock);
}

/* Writes the inodes opened since the last call to `out`, which has room for PACE; returns how many. */
uint32_t opens_heard(uint64_t *out)
{
	uint32_t count;

	pthread_mutex_lock(&lock);
	count = unheard;
	memcpy(out, heard, count * sizeof *out);
	unheard = 0;
	pthread_mutex_unlock(&lock);
	return count;
}

static int open_for_reading(int device, const struct fuse_in_header *request, const struct fuse_open_in *how)
{
	struct fuse_open_out opened = {.fh = OURS | request->nodeid, .open_flags = FOPEN_KEEP_CACHE};
	uint32_t slot = slot_of(request->nodeid);

	if (how->flags & WRITING || !table[slot].inode || unheard == PACE)
		return 0;
	if (!porter_reply(device, request->unique, &opened, sizeof opened)) { /* else the caller is gone: no release will come */
		table[slot].opens++;
		heard[unheard++] = request->nodeid;
	}
	return 1;
}

static int released(int device, const struct fuse_in_header *request, const struct fuse_release_in *what)
{
	uint32_t slot = slot_of(request->nodeid);

	if (!(what->fh & OURS) || !table[slot].inode || !table[slot].opens)
		return 0;
	table[slot].opens--;
	porter_reply(device, request->unique, NULL, 0);
	return 1;
}

int opens_answered(int device, const struct fuse_in_header *request, size_t size)
{
	const void *body = request + 1;
	int done = 0;

	pthread_mutex_lock(&lock);
	if (request->opcode == FUSE_OPEN && size >= sizeof *request + sizeof(struct fuse_open_in))
		done = open_for_reading(device, request, body);
	else if (request->opcode == FUSE_RELEASE && size >= sizeof *request + sizeof(struct fuse_release_in))
		done = released(device, request, body);
	pthread_mutex_unlock(&lock);
	return done;
}
