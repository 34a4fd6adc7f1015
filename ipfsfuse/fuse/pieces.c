/* Answers small reads of staged leaves without Python: reads pieces of leaves that were verified once from
 * their staging file, and verifies them by their tags (tags.h). Python says which leaves (device.py).
 *
 * Reads from the page cache are answered in the device's thread. Reads from the disk run in up to READERS
 * threads, which are started when they are needed. Reads that fail, or whose bytes are wrong, go to Python,
 * which handles that. The staging file is opened by its name for each read, so that no descriptor keeps an
 * evicted file on the disk. One read in PASSED_ON of a file goes to Python, so that Python knows that the
 * file is in use. The leaves of a file stay in the table after it is closed. When the table is full, the file
 * that was read least recently is removed.
 * Concurrency: one lock for the table of leaves and for the queue; it is not held while a file is read. Call
 * pieces_allow and pieces_open with Python's lock held.
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
#define MAX_READ (64U << 10)  /* bytes of the largest read that is answered here: for larger ones Python reads ahead */
#define PIECES (MAX_READ / PIECE + 1)
#define HELD (16U << 20)      /* bytes of tags and of the structures around them, for all files */
#define NAME 300              /* bytes of the name of a staging file, with the last 0 */
#define READERS 8
#define STOP_SECONDS 5
#define WAITING 64            /* reads that may wait for those threads; further ones go to Python */
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
	struct leaf **leaves; /* sorted by their starts */
};

/* One read, with everything that it needs, copied from the table. */
struct job {
	struct job *next;
	int device, folder;
	int interrupted;      /* its caller got a signal meanwhile */
	int64_t read_at;
	uint64_t start, skip; /* offset of its first piece in the file; bytes of that piece before the read */
	size_t size, wanted;  /* bytes of its pieces; bytes of the read */
	uint8_t tags[PIECES * TAG];
	char name[NAME];
	struct { struct fuse_in_header header; struct fuse_read_in what; } request;
};

static struct file *files[BUCKETS];
static struct file *newest, *oldest; /* ends of the list by last use */
static size_t held;
static uint8_t key[TAG_KEY];
/* A reading thread. */
struct reader {
	pthread_t thread;
	struct job *job; /* the job that it works on */
	int reads;       /* it waits for the disk */
	int abandoned;   /* it was left behind: it drops what it has read and frees itself */
};

static struct job *first, **last = &first; /* the queue for the reading threads */
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

/* Bytes of memory: with the Python object of the tags, and two places in the array, which may be half empty.
 * */
static size_t cost(const struct leaf *leaf) { return leaf->tags.len + sizeof *leaf + 2 * sizeof leaf + 64; }

static void discard(struct leaf *leaf)
{
	if (leaf)
		PyBuffer_Release(&leaf->tags);
	PyMem_Free(leaf);
}

/* Frees files that are not in the table (a list, or NULL). This may run Python code, so the caller must not
 * hold our lock. */
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

/* Removes the file at `place` from the table, and puts it in front of the list `gone`. */
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

/* The file of `inode`, with room for one more leaf; it is added to the table if it is missing. NULL without
 * memory. */
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

/* Puts `leaf` into the table. Moves files that must make room for it to the list `gone`. Returns the leaf to
 * discard: the one that was there before, or `leaf` if there is no room. */
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

/* Adds a leaf: the bytes [start, start + size) of the file `inode`, which are at the same offset in the
 * staging file `name` in the open folder `folder`. `content` has the tags of its pieces. Does nothing if the
 * sizes don't fit. */
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

/* `inode` is opened. Its staging file is called `name` or `name`.part. If the inode was another file before,
 * removes that file's leaves. */
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

/* Sets the key of all tags, TAG_KEY bytes. Call this before a session. */
void pieces_key(const uint8_t *bytes) { memcpy(key, bytes, TAG_KEY); }

/* Fills `job` for a read, if one leaf in the table contains all of it. */
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

/* Reads the pieces of `job` into `room`. With `now`, does not wait for the disk. */
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
			device_pass_on((const char *)&job->request, sizeof job->request, job->read_at, &job->interrupted);
		pthread_mutex_lock(&lock);
		ours->job = NULL;
		free(job);
	}
	pthread_mutex_unlock(&lock);
	free(room);
	return NULL;
}

/* Starts one more thread, if there may be one. */
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

/* Queues `job` for the reading threads. Returns 0 if there is none, or the queue is full. */
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

/* The caller of the request `unique` got a signal. If the request waits here, notes that for when it is
 * passed on. */
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

	if (request->opcode != FUSE_READ || size < sizeof job->request || what->size > MAX_READ || !(job = malloc(sizeof *job)))
		return 0;
	pthread_mutex_lock(&lock);
	done = find(request->nodeid, what, job);
	pthread_mutex_unlock(&lock);
	if (done) {
		memcpy(&job->request, request, sizeof job->request);
		job->device = device;
		job->interrupted = 0;
		job->read_at = device_now();
		outcome = read_pieces(job, room, 1);
		done = outcome == RIGHT ? reply(job, room) : outcome == NOT_AT_HAND && hand_over(job);
	}
	if (!done || outcome == RIGHT)
		free(job);
	return done;
}

/* Waits for the end of a thread. One that still waits for the disk at the time `until` is left behind. */
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

/* Ends the threads and drops the queue. Leaves a thread behind that waits for a disk which does not answer.
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
