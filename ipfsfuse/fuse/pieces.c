/* Small reads of staged leaves that Python is not asked about: pieces of leaves that were verified once, read from their
 * staging file and proved by their tags (tags.h). device.py says which.
 *
 * What is in the page cache is answered in the device's thread. What must come from the disk is read in threads of
 * ours, up to READERS of them, which begin when they are needed. What can't be read, or is not right, goes to Python,
 * which knows what to do. The staging file is opened for each read, by its name: so no descriptor keeps what
 * was evicted on the disk. One read in PASSED_ON of a file goes to Python, so that it knows that the file is in use.
 * What is known of a file outlives its close. When too much is known, the file goes that was read least recently.
 * Concurrency: one lock for the table of leaves and for what waits; it is not held while a file is read. Call pieces_allow
 * and pieces_open with Python's lock held.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include "device.h"
#include "../fileio/tags.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PIECE 8192U           /* bytes of a piece, as in staging.py */
#define MOST (64U << 10)      /* bytes of the largest read that is answered here: who reads more is read ahead for */
#define PIECES (MOST / PIECE + 1)
#define HELD (16U << 20)      /* bytes of tags, and of what they are held in, for all files */
#define NAME 300              /* bytes of the name of a staging file, the last 0 included */
#define READERS 8
#define STOP_SECONDS 5
#define WAITING 64            /* reads that may wait for those threads; more go to Python */
#define PASSED_ON 128
#define BUCKETS 1024

struct leaf { uint64_t start, size; Py_buffer tags; };
struct file {
	struct file *in_bucket, *newer, *older;
	uint64_t inode;
	uint32_t answered;
	int folder;
	char name[NAME];
	size_t count, room;
	struct leaf **leaves; /* by where they start */
};

/* One read: what it needs, copied from the table. */
struct job {
	struct job *next;
	int device, folder;
	int interrupted;      /* its caller got a signal meanwhile */
	uint64_t start, skip; /* where its first piece starts in the file, and how much of that was not asked for */
	size_t size, wanted;  /* bytes of its pieces, and those that were asked for */
	uint8_t tags[PIECES * TAG];
	char name[NAME];
	struct { struct fuse_in_header header; struct fuse_read_in what; } request;
};

static struct file *files[BUCKETS];
static struct file *newest, *oldest; /* by when they were read last */
static size_t held;
static uint8_t key[TAG_KEY];
/* A thread of ours. */
struct reader {
	pthread_t thread;
	struct job *job; /* the one that it has taken */
	int reads;       /* it waits for the disk */
	int abandoned;   /* nobody knows it any more: what it has read is dropped */
};

static struct job *first, **last = &first; /* those that wait for the disk */
static struct reader *readers[READERS];
static unsigned waiting, idle, started;
static int stopping;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t more = PTHREAD_COND_INITIALIZER;

/* -- the table ----------------------------------------------------------------------------------------- */

static struct file **place_of(uint64_t inode)
{
	struct file **place = &files[inode % BUCKETS];

	while (*place && (*place)->inode != inode)
		place = &(*place)->in_bucket;
	return place;
}

static void unlink_use(struct file *one)
{
	*(one->newer ? &one->newer->older : &newest) = one->older;
	*(one->older ? &one->older->newer : &oldest) = one->newer;
}

static void link_use(struct file *one)
{
	one->newer = NULL;
	one->older = newest;
	*(newest ? &newest->newer : &oldest) = one;
	newest = one;
}

static void note_use(struct file *one)
{
	if (one != newest) {
		unlink_use(one);
		link_use(one);
	}
}

/* The number of leaves of `one` that start at `offset` or before. */
static size_t before(const struct file *one, uint64_t offset)
{
	size_t low = 0, high = one->count, middle;

	while (low < high) {
		middle = low + (high - low) / 2;
		if (one->leaves[middle]->start <= offset)
			low = middle + 1;
		else
			high = middle;
	}
	return low;
}

/* Bytes of memory: its tags are a Python object of their own, and its place in the array may be empty beside another. */
static size_t cost(const struct leaf *leaf) { return leaf->tags.len + sizeof *leaf + 2 * sizeof leaf + 64; }

static void discard(struct leaf *leaf)
{
	if (leaf)
		PyBuffer_Release(&leaf->tags);
	PyMem_Free(leaf);
}

/* Of files that are out of the table, or NULL. Python code may run in it, so the caller must not hold our lock. */
static void discard_files(struct file *one)
{
	struct file *next;

	for (; one; one = next) {
		next = one->in_bucket;
		for (size_t each = 0; each < one->count; each++)
			discard(one->leaves[each]);
		free(one->leaves);
		free(one);
	}
}

/* Takes the file at `place` out of the table, and puts it before `gone`. */
static struct file *take_out(struct file **place, struct file *gone)
{
	struct file *one = *place;

	*place = one->in_bucket;
	one->in_bucket = gone;
	unlink_use(one);
	held -= sizeof *one;
	for (size_t each = 0; each < one->count; each++)
		held -= cost(one->leaves[each]);
	return one;
}

/* The file of `inode`, which is made if need be, with room for one more leaf. NULL without memory. */
static struct file *file_of(uint64_t inode)
{
	struct file **place = place_of(inode), *one = *place;
	size_t room;
	void *leaves;

	if (!one) {
		if (!(one = calloc(1, sizeof *one)))
			return NULL;
		one->inode = inode;
		*place = one;
		link_use(one);
		held += sizeof *one;
	}
	if (one->count == one->room) {
		room = one->room ? 2 * one->room : 8;
		if (!(leaves = realloc(one->leaves, room * sizeof *one->leaves)))
			return NULL;
		one->leaves = leaves;
		one->room = room;
	}
	note_use(one);
	return one;
}

/* Puts `leaf` into the table, and before that the files that must make room for it to `gone`. Returns what is to be
 * discarded: the leaf that was there, or `leaf` where there is no room. */
static struct leaf *put(uint64_t inode, int folder, const char *name, struct leaf *leaf, struct file **gone)
{
	struct file *one = file_of(inode);
	struct leaf *old;
	size_t at;

	if (!one)
		return leaf;
	one->folder = folder;
	strcpy(one->name, name);
	at = before(one, leaf->start);
	if (at && one->leaves[at - 1]->start == leaf->start) {
		old = one->leaves[at - 1];
		held += cost(leaf) - cost(old);
		one->leaves[at - 1] = leaf;
		return old;
	}
	while (held + cost(leaf) > HELD && oldest != one)
		*gone = take_out(place_of(oldest->inode), *gone);
	if (held + cost(leaf) > HELD)
		return leaf;
	held += cost(leaf);
	memmove(one->leaves + at + 1, one->leaves + at, (one->count++ - at) * sizeof *one->leaves);
	one->leaves[at] = leaf;
	return NULL;
}

/* The bytes [start, start + size) of the file `inode` lie at the same place in the staging file `name` of the open folder
 * `folder`, as one leaf. `content` has the tags of its pieces. Does nothing where that does not fit. */
void pieces_allow(uint64_t inode, int folder, const char *name, uint64_t start, uint64_t size, PyObject *content)
{
	struct leaf *leaf = PyMem_Malloc(sizeof *leaf);
	struct file *gone = NULL;

	if (!leaf || PyObject_GetBuffer(content, &leaf->tags, PyBUF_SIMPLE)) {
		PyErr_Clear();
		PyMem_Free(leaf);
		return;
	}
	leaf->start = start;
	leaf->size = size;
	if (strlen(name) < NAME && size && (uint64_t)leaf->tags.len == (size + PIECE - 1) / PIECE * TAG) {
		pthread_mutex_lock(&lock);
		leaf = put(inode, folder, name, leaf, &gone);
		pthread_mutex_unlock(&lock);
	}
	discard(leaf);
	discard_files(gone);
}

/* `inode` is opened: as the file whose staging file is called `name`, or so and .part. If it was another file before, nothing
 * more is known of it. */
void pieces_open(uint64_t inode, const char *name)
{
	struct file **place, *gone = NULL;

	pthread_mutex_lock(&lock);
	place = place_of(inode);
	if (*place && strncmp((*place)->name, name, strlen(name)))
		gone = take_out(place, NULL);
	pthread_mutex_unlock(&lock);
	discard_files(gone);
}

/* The key by which all tags are made, TAG_KEY bytes. Call this before a session. */
void pieces_key(const uint8_t *bytes) { memcpy(key, bytes, TAG_KEY); }

/* Fills `job` with what a read needs, if one leaf that is known holds all of it. */
static int find(uint64_t inode, const struct fuse_read_in *what, struct job *job)
{
	struct file *one = *place_of(inode);
	const struct leaf *leaf;
	uint64_t offset, end, piece;
	size_t at;

	if (!one || !what->size || !(at = before(one, what->offset)))
		return 0;
	leaf = one->leaves[at - 1];
	offset = what->offset - leaf->start;
	if (offset >= leaf->size || what->size > leaf->size - offset || ++one->answered % PASSED_ON == 0)
		return 0;
	end = offset + what->size;
	note_use(one);
	piece = offset / PIECE;
	job->skip = offset % PIECE;
	job->start = leaf->start + piece * PIECE;
	job->wanted = what->size;
	end = (end + PIECE - 1) / PIECE * PIECE;
	job->size = (end < leaf->size ? end : leaf->size) - piece * PIECE;
	memcpy(job->tags, (const char *)leaf->tags.buf + piece * TAG, (job->size + PIECE - 1) / PIECE * TAG);
	job->folder = one->folder;
	memcpy(job->name, one->name, NAME);
	return 1;
}

/* -- reading ------------------------------------------------------------------------------------------- */

enum outcome { RIGHT, NOT_AT_HAND, WRONG };

/* Reads the pieces of `job` into `room`, without waiting for the disk if `now`. */
static enum outcome read_pieces(const struct job *job, char *room, int now)
{
	struct open_how how = {
		.flags = O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK,
		.resolve = RESOLVE_CACHED,
	};
	struct iovec part = {room, job->size};
	int file = now ? syscall(SYS_openat2, job->folder, job->name, &how, sizeof how)
		       : openat(job->folder, job->name, how.flags);
	ssize_t got;

	if (file < 0)
		return now ? NOT_AT_HAND : WRONG;
	got = preadv2(file, &part, 1, job->start, now ? RWF_NOWAIT : 0);
	close(file);
	return got == (ssize_t)job->size ? RIGHT : now ? NOT_AT_HAND : WRONG;
}

static int is_right(const struct job *job, const char *room)
{
	uint8_t tag[TAG];

	for (size_t at = 0; at < job->size; at += PIECE) {
		tag_of(key, (const uint8_t *)room + at, job->size - at < PIECE ? job->size - at : PIECE, tag);
		if (memcmp(tag, job->tags + at / PIECE * TAG, TAG))
			return 0;
	}
	return 1;
}

static int reply(const struct job *job, const char *room)
{
	return is_right(job, room) && reply_send(job->device, job->request.header.unique, room + job->skip, job->wanted) != REPLY_FAILED;
}

static void *read_from_disk(void *place)
{
	struct reader *ours = place;
	char *room = malloc(PIECES * PIECE);
	enum outcome outcome;
	struct job *job;

	pthread_mutex_lock(&lock);
	for (;;) {
		idle++;
		while (!first && !stopping)
			pthread_cond_wait(&more, &lock);
		idle--;
		if (stopping)
			break;
		job = first;
		first = job->next;
		if (!first)
			last = &first;
		waiting--;
		ours->job = job;
		ours->reads = 1;
		pthread_mutex_unlock(&lock);
		outcome = room ? read_pieces(job, room, 0) : WRONG;
		pthread_mutex_lock(&lock);
		ours->reads = 0;
		if (ours->abandoned) { /* the device is closed, and its descriptor may be another file's */
			pthread_mutex_unlock(&lock);
			free(job);
			free(ours);
			free(room);
			return NULL;
		}
		pthread_mutex_unlock(&lock);
		if (outcome != RIGHT || !reply(job, room))
			device_pass_on((const char *)&job->request, sizeof job->request, &job->interrupted);
		pthread_mutex_lock(&lock);
		ours->job = NULL;
		free(job);
	}
	pthread_mutex_unlock(&lock);
	free(room);
	return NULL;
}

/* One more thread, if there may be one. */
static void start_reader(void)
{
	struct reader *one;

	if (started == READERS || !(one = calloc(1, sizeof *one)))
		return;
	if (pthread_create(&one->thread, NULL, read_from_disk, one))
		free(one);
	else
		readers[started++] = one;
}

/* Has `job` done by a thread. Returns 0 where there is none. */
static int hand_over(struct job *job)
{
	int done = 0;

	pthread_mutex_lock(&lock);
	if (waiting >= idle)
		start_reader();
	if (started && waiting < WAITING) {
		job->next = NULL;
		*last = job;
		last = &job->next;
		waiting++;
		done = 1;
		pthread_cond_signal(&more);
	}
	pthread_mutex_unlock(&lock);
	return done;
}

/* The caller of the request `unique` got a signal. If that waits here, this is remembered for the case that it is passed on. */
void pieces_interrupt(uint64_t unique)
{
	struct job *job;
	unsigned each;

	pthread_mutex_lock(&lock);
	for (job = first; job; job = job->next)
		job->interrupted |= job->request.header.unique == unique;
	for (each = 0; each < started; each++)
		if ((job = readers[each]->job))
			job->interrupted |= job->request.header.unique == unique;
	pthread_mutex_unlock(&lock);
}

int pieces_answer(int device, const struct fuse_in_header *request, size_t size)
{
	static char room[PIECES * PIECE]; /* one thread reads the device */
	const struct fuse_read_in *what = (const void *)(request + 1);
	struct job *job;
	enum outcome outcome = WRONG;
	int done;

	if (request->opcode != FUSE_READ || size < sizeof job->request || what->size > MOST || !(job = malloc(sizeof *job)))
		return 0;
	pthread_mutex_lock(&lock);
	done = find(request->nodeid, what, job);
	pthread_mutex_unlock(&lock);
	if (done) {
		memcpy(&job->request, request, sizeof job->request);
		job->device = device;
		job->interrupted = 0;
		outcome = read_pieces(job, room, 1);
		done = outcome == RIGHT ? reply(job, room) : outcome == NOT_AT_HAND && hand_over(job);
	}
	if (!done || outcome == RIGHT)
		free(job);
	return done;
}

/* Waits for the end of a thread, until `until` if it waits for the disk: then it is left to itself, and does nothing more. */
static void end_reader(struct reader *one, const struct timespec *until)
{
	int abandoned = 0;

	if (pthread_timedjoin_np(one->thread, NULL, until)) {
		pthread_mutex_lock(&lock);
		abandoned = one->abandoned = one->reads;
		if (abandoned)
			pthread_detach(one->thread);
		pthread_mutex_unlock(&lock);
		if (!abandoned) /* it is replying, which takes no longer than reply_send says */
			pthread_join(one->thread, NULL);
	}
	if (!abandoned)
		free(one);
}

/* Ends the threads. What waits for them is dropped. A thread that waits for a disk which does not answer is left to itself.
 * Call this when the device's thread has stopped. */
void pieces_stop(void)
{
	struct timespec until;
	struct job *job;
	unsigned each;

	pthread_mutex_lock(&lock);
	stopping = 1;
	pthread_cond_broadcast(&more);
	pthread_mutex_unlock(&lock);
	clock_gettime(CLOCK_REALTIME, &until);
	until.tv_sec += STOP_SECONDS;
	for (each = 0; each < started; each++)
		end_reader(readers[each], &until);
	pthread_mutex_lock(&lock);
	started = 0;
	while ((job = first)) {
		first = job->next;
		free(job);
	}
	last = &first;
	waiting = stopping = 0;
	pthread_mutex_unlock(&lock);
}

/* Call this when the threads have ended. */
void pieces_clear(void)
{
	while (oldest)
		discard_files(take_out(place_of(oldest->inode), NULL));
}
