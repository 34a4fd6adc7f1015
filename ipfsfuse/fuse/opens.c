/* Answers opens for reading, and releases, of inodes that Python allowed or offered (device.py). Also answers the last
 * two requests of a directory's reader after Python has given the last entry: whether there are more entries,
 * and the release.
 *
 * Python also offers the contents of small files that will be opened soon. When such a file is opened, its
 * content is stored into the kernel's page cache, and the open is answered here.
 *
 * Nothing is stored into a file that is open. The kernel locks a page while it waits for our reply to a read
 * of it, and a store into that page waits for the lock. If the daemon is killed at that moment, both wait
 * forever: the storing thread keeps the connection alive, and no process is left to reply. So Python withdraws
 * the offer of a file before it answers an open of it.
 *
 * A request costs pyfuse3 45 us and more. Reading a small file from the page cache takes only an open and a
 * release; so does reading a directory whose listing is cached. Listing a directory for the first time takes
 * four requests.
 * Concurrency: one lock for the tables; any thread may call.
 */
#define _GNU_SOURCE
#include "device.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#define ANSWERED_HERE (1ULL << 63) /* set in a handle that was given here; the other bits are the inode's number */
#define SLOTS (1U << 16)
#define FULL (SLOTS / 2)
#define UNDRAINED 256              /* opens that Python has not drained; the next open goes to Python. Releases alike */
#define DRAIN_AT 64                /* opens after which Python is woken to drain them */
#define OFFERS 256                 /* the last so many offers are kept */
#define LISTINGS 1024
#define WRITING (O_WRONLY | O_RDWR | O_TRUNC | O_APPEND | O_CREAT)

static struct { uint64_t inode; uint32_t opens; } table[SLOTS];
static uint32_t used_slots;
static struct { uint64_t handle, end; } listings[LISTINGS]; /* listings with a known end, at handle % LISTINGS */
static struct undrained { uint64_t numbers[UNDRAINED]; uint32_t users[UNDRAINED], count; }
	opened,   /* inodes that were opened here, and by whom, and that Python has not drained */
	released; /* handles of directories that were released here, and that Python has not drained */
static struct { uint64_t inode; char *content; uint32_t size; } offers[OFFERS]; /* `inode` is 0 for no offer */
static uint32_t next_offer;
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

/* Frees `slot`, and moves up the entries after it that would have been there. */
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

static void allow(uint64_t inode)
{
	uint32_t slot;

	if (used_slots >= FULL)
		drop_idle();
	slot = slot_of(inode);
	if (!table[slot].inode && used_slots < FULL) {
		table[slot].inode = inode;
		table[slot].opens = 0;
		used_slots++;
	}
}

static void clear_offer(uint32_t place)
{
	free(offers[place].content);
	offers[place].content = NULL;
	offers[place].inode = 0;
}

static void clear_offers(void)
{
	for (uint32_t place = 0; place < OFFERS; place++)
		clear_offer(place);
}

/* The place of the offer of `inode`, or OFFERS if there is none. */
static uint32_t offer_of(uint64_t inode)
{
	uint32_t place = 0;

	while (place < OFFERS && offers[place].inode != inode)
		place++;
	return place;
}

static void withdraw(uint64_t inode)
{
	uint32_t place = offer_of(inode);

	if (place < OFFERS)
		clear_offer(place);
}

/* From now on, opens of `inode` for reading are answered here. It must be a regular file whose attributes the
 * kernel has correctly, or a directory that never changes. */
void opens_allow(uint64_t inode)
{
	pthread_mutex_lock(&lock);
	allow(inode);
	pthread_mutex_unlock(&lock);
}

/* From now on, opens of `inode` go to Python again, and nothing is stored into it. Returns how often it is
 * open here; those releases go to Python too. */
uint32_t opens_revoke(uint64_t inode)
{
	uint32_t slot, opens = 0;

	pthread_mutex_lock(&lock);
	withdraw(inode);
	slot = slot_of(inode);
	if (table[slot].inode) {
		opens = table[slot].opens;
		drop(slot);
	}
	pthread_mutex_unlock(&lock);
	return opens;
}

/* Offers the content of `inode`, or its beginning. It must be a regular file that Python does not have open, and whose
 * attributes the kernel has correctly. The next open stores it, unless the file is open here. */
void opens_offer(uint64_t inode, const char *content, uint32_t size)
{
	char *copy = malloc(size + 1); /* never NULL for an empty file */

	if (!copy)
		return;
	memcpy(copy, content, size);
	pthread_mutex_lock(&lock);
	withdraw(inode);
	clear_offer(next_offer);
	offers[next_offer].inode = inode;
	offers[next_offer].content = copy;
	offers[next_offer].size = size;
	next_offer = (next_offer + 1) % OFFERS;
	pthread_mutex_unlock(&lock);
}

/* From now on nothing is stored into `inode`. Waits while another request is answered here, mostly about 20 us. */
void opens_withdraw(uint64_t inode)
{
	pthread_mutex_lock(&lock);
	withdraw(inode);
	pthread_mutex_unlock(&lock);
}

/* Calls opens_revoke for every inode that is not open, and withdraws all offers. */
void opens_revoke_idle(void)
{
	pthread_mutex_lock(&lock);
	drop_idle();
	clear_offers();
	pthread_mutex_unlock(&lock);
}

/* Call this when the device thread has stopped: the next session starts with an empty table. */
void opens_clear(void)
{
	clear_offers();
	memset(table, 0, sizeof table);
	used_slots = opened.count = released.count = 0;
	memset(listings, 0, sizeof listings);
}

static uint32_t drain(struct undrained *list, uint64_t *numbers, uint32_t *users)
{
	uint32_t count;

	pthread_mutex_lock(&lock);
	count = list->count;
	memcpy(numbers, list->numbers, count * sizeof *numbers);
	memcpy(users, list->users, count * sizeof *users);
	list->count = 0;
	pthread_mutex_unlock(&lock);
	return count;
}

/* Writes the inodes that were opened since the last call, and the ids of the users who opened them. Both have room
 * for UNDRAINED. Returns their number. */
uint32_t opens_drain(uint64_t *inodes, uint32_t *users) { return drain(&opened, inodes, users); }

/* The same for the handles of directories that were released. */
uint32_t opens_released(uint64_t *handles, uint32_t *users) { return drain(&released, handles, users); }

static void note(struct undrained *list, uint64_t number, uint32_t user)
{
	list->numbers[list->count] = number;
	list->users[list->count++] = user;
}

/* Counts a release that could not be answered here, and that Python has got. */
void opens_release(uint64_t inode)
{
	uint32_t slot;

	pthread_mutex_lock(&lock);
	slot = slot_of(inode);
	if (table[slot].inode && table[slot].opens)
		table[slot].opens--;
	pthread_mutex_unlock(&lock);
}

/* Stores the content that was offered for `inode`, unless the file is open. */
static void take_offer(int device, uint64_t inode)
{
	uint32_t place = offer_of(inode), slot = slot_of(inode);
	int is_open = table[slot].inode && table[slot].opens;

	if (place == OFFERS)
		return;
	if (!is_open && reply_store(device, inode, offers[place].content, offers[place].size))
		allow(inode);
	clear_offer(place);
}

static int answer_open(int device, const struct fuse_in_header *request, const struct fuse_open_in *how)
{
	struct fuse_open_out answer = {.fh = ANSWERED_HERE | request->nodeid, .open_flags = FOPEN_KEEP_CACHE};
	uint32_t slot;
	enum reply reply;

	if (how->flags & WRITING)
		return 0;
	take_offer(device, request->nodeid);
	slot = slot_of(request->nodeid);
	if (!table[slot].inode || opened.count == UNDRAINED)
		return 0;
	if (request->opcode == FUSE_OPENDIR)
		answer.open_flags |= FOPEN_CACHE_DIR;
	reply = reply_send(device, request->unique, &answer, sizeof answer);
	if (reply == REPLY_SENT) { /* only then will a RELEASE come */
		table[slot].opens++;
		note(&opened, request->nodeid, request->uid);
		if (opened.count == DRAIN_AT)
			device_notify();
	}
	return reply != REPLY_FAILED;
}

static int answer_release(int device, const struct fuse_in_header *request, const struct fuse_release_in *what)
{
	uint32_t slot = slot_of(request->nodeid);

	if (!(what->fh & ANSWERED_HERE) || !table[slot].inode || !table[slot].opens)
		return 0;
	if (reply_send(device, request->unique, NULL, 0) == REPLY_FAILED)
		return 0; /* Python counts it, by opens_release if it has not taken the file over */
	table[slot].opens--;
	return 1;
}

/* The last entry of the open directory `handle` has the offset `end`. Another handle may overwrite this. */
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
	note(&released, what->fh, request->uid);
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
