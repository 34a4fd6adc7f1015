/* Reads blocks of a Kubo repository (flatfs: one file for each block, named by its multihash). One call reads
 * and hashes a block, without Python's lock. Threads of this file read ahead for a program that goes down a
 * path: after a block it needs one of the blocks that this block links. So the disk works while Python
 * answers the requests in between.
 *
 * The children of a directory of at most MAX_CHILDREN entries are read ahead. Once one of them is asked for
 * and is a file, the first blocks of that file are read ahead too, down to its first leaf. Nothing is read
 * ahead while other blocks are asked for, because the disk is busy then.
 *
 * One call can read many blocks, with READERS threads. A block that is not in the page cache costs three disk
 * reads, one after the other: the folder's entry, the file and its bytes.
 *
 * Nothing here verifies a block. A link is only a hint; the caller compares the hash of a block.
 * Concurrency: any thread may call. At most READ_AHEAD_THREADS threads read ahead, and use nothing of Python.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define MAX_BLOCK (2 << 20)
#define MAX_CHILDREN 4
#define DEEPEST 5               /* levels below a directory */
#define SLOTS 16
#define MAX_AHEAD 16            /* blocks that are read ahead after one that was asked for alone */
#define READ_AHEAD_THREADS 2
#define READERS 4               /* threads that read the blocks of one call, the calling one included */
#define KEPT (4 << 20)          /* bytes of blocks that were read ahead and not taken yet */
#define KEPT_NS 1000000000LL    /* how long they are kept */
#define ALONE_NS 20000000LL     /* children are read ahead only if no block was asked for in this time */
/* Bytes of one read. They are hashed while the disk reads the next ones. If all of 1 MiB is asked for at once, the
 * first bytes come after 1.0 ms; with two pieces of 128 KiB at a time after 0.4 ms. */
#define PIECE (128 << 10)
#define PIECES_ASKED 2          /* pieces that the disk reads at a time */
#define POPULATE_WRITE 23       /* MADV_POPULATE_WRITE, which older headers lack */
#define DIGEST 32
#define DAG_PB 0x70
#define RAW 0x55
#define MISSING -1
#define NO_ROOM INT64_MIN

/* OpenSSL's functions, as `hashlib` uses them; all NULL if they are not available. */
struct sha256 {
	void *(*new)(void);
	int (*init)(void *, const void *, void *);
	int (*update)(void *, const void *, size_t);
	int (*final)(void *, unsigned char *, unsigned *);
	void (*free)(void *);
	const void *(*type)(void);
};

struct found {
	int64_t size;           /* the size; MISSING; -size if the block is too large; or NO_ROOM */
	char *bytes;            /* to be given back by `release` */
	int is_hashed;
	uint8_t hash[DIGEST];
};

struct link {
	uint8_t digest[DIGEST];
	int codec, is_named;
};

struct slot {
	enum { FREE, WANTED, READING, READ } state;
	uint8_t digest[DIGEST];
	int codec;
	int level;              /* number of levels below the directory that was asked for or taken last */
	int on_path;            /* asked for, or the first block of such a file: its first link is read too */
	atomic_int unwanted;    /* stop reading it: another child was asked for, or there is no room */
	int64_t order, family, read_at;
	struct found found;
	struct link links[MAX_CHILDREN + 1]; /* the first of a dag-pb block */
	int link_count;
};

struct repo {
	char *folder;
	int characters;
	struct sha256 sha256;
	pthread_mutex_t lock;
	pthread_cond_t work, done;
	struct slot slots[SLOTS];
	int64_t asked_at, order, kept;
	int left;               /* blocks that may still be read ahead; a walk of directories uses it up */
	int is_slow;            /* a wait for a block timed out: do not wait until one is asked for alone */
	int is_blocked;
	int threads, stopping, orphaned;
	char *own;              /* memory for one block of more than PIECE bytes, or NULL */
	_Atomic(char *) unused; /* `own` while no block is in it, else NULL */
};

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* -- one file -------------------------------------------------------------------------------------------- */

/* A block's file is named by the base32 of its multihash. Its folder is named by the last characters of that
 * name, without the very last one. */
static int path_of(const struct repo *repo, const uint8_t *digest, char *path, size_t room)
{
	static const char alphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
	uint8_t multihash[2 + DIGEST + 1] = {0x12, DIGEST};
	char name[56];
	size_t bit, each;

	memcpy(multihash + 2, digest, DIGEST);
	for (each = 0; each < 55; each++) { /* 34 bytes: 272 bits, and three zeros */
		bit = each * 5;
		name[each] = alphabet[(multihash[bit / 8] << 8 | multihash[bit / 8 + 1]) >> (11 - bit % 8) & 31];
	}
	name[55] = 0;
	return snprintf(path, room, "%s/%.*s/%s.data", repo->folder, repo->characters, name + 54 - repo->characters, name) < (int)room;
}

/* Lets the kernel map memory for all pages at once (Linux 5.14 and later). Touching them one after the other
 * costs 0.3 to 0.5 ms for 1 MiB. */
static void populate(char *bytes, int64_t size)
{
	uintptr_t page = sysconf(_SC_PAGESIZE), first = ((uintptr_t)bytes + page - 1) & -page;

	madvise((void *)first, ((uintptr_t)bytes + size - first) & -page, POPULATE_WRITE);
}

/* Memory for a block. One large block at a time gets memory that is mapped already: in a virtual machine, mapping
 * takes up to 0.5 ms for 1 MiB. */
static char *room_for(struct repo *repo, int64_t size)
{
	char *bytes = size > PIECE ? atomic_exchange(&repo->unused, NULL) : NULL;

	return bytes ? bytes : malloc(size ? size : 1);
}

static void release(struct repo *repo, char *bytes)
{
	if (bytes && bytes == repo->own)
		repo->unused = bytes;
	else
		free(bytes);
}

/* Reads and hashes `found->size` bytes. Stops if they become unwanted. */
static int read_open(const struct repo *repo, int file, struct found *found, atomic_int *unwanted)
{
	void *hasher = repo->sha256.new ? repo->sha256.new() : NULL;
	int64_t at, asked, size = found->size;
	ssize_t got;
	int is_large = size > PIECE, hashed = hasher && repo->sha256.init(hasher, repo->sha256.type(), NULL);

	for (asked = 0; is_large && asked < PIECES_ASKED * PIECE; asked += PIECE)
		posix_fadvise(file, asked, PIECE, POSIX_FADV_WILLNEED);
	if (is_large && found->bytes != repo->own)
		populate(found->bytes, size); /* while the disk works */
	for (at = 0; at < size; at += got) {
		got = pread(file, found->bytes + at, size - at < PIECE ? size - at : PIECE, at);
		if (got <= 0 || (unwanted && *unwanted))
			break;
		if (is_large && asked < size) {
			posix_fadvise(file, asked, PIECE, POSIX_FADV_WILLNEED);
			asked += PIECE;
		}
		hashed = hashed && repo->sha256.update(hasher, found->bytes + at, got);
	}
	found->is_hashed = hashed && at == size && repo->sha256.final(hasher, found->hash, NULL);
	if (hasher)
		repo->sha256.free(hasher);
	return at == size;
}

/* Reads a block's file, if it is a regular file. Links are not followed. O_NONBLOCK: the open must not wait
 * for a pipe. With `room`, reads only if `room` has as many bytes left. */
static void read_block(struct repo *repo, const uint8_t *digest, struct found *found, atomic_int *unwanted, atomic_llong *room)
{
	char path[4096];
	struct stat info;
	int file;

	*found = (struct found){.size = MISSING};
	if (!path_of(repo, digest, path, sizeof path))
		return;
	file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
	if (file < 0)
		return;
	if (!fstat(file, &info) && S_ISREG(info.st_mode)) {
		if (info.st_size > MAX_BLOCK)
			found->size = -info.st_size;
		else if (room && atomic_fetch_sub(room, info.st_size) < info.st_size)
			found->size = NO_ROOM;
		else if ((found->bytes = room_for(repo, info.st_size))) {
			found->size = info.st_size;
			if (!read_open(repo, file, found, unwanted)) {
				release(repo, found->bytes);
				*found = (struct found){.size = MISSING};
			}
		}
	}
	close(file);
}

/* -- what a block links ---------------------------------------------------------------------------------- */

/* Reads the protobuf varint at `at`. Returns the place after it, or NULL if it does not end before `end`. */
static const uint8_t *varint(const uint8_t *at, const uint8_t *end, uint64_t *value)
{
	int shift;

	for (*value = shift = 0; at < end && shift < 64; shift += 7) {
		*value |= (uint64_t)(*at & 0x7f) << shift;
		if (!(*at++ & 0x80))
			return at;
	}
	return NULL;
}

/* Reads the tag of the field at `at`. Returns its content, which has `size` bytes and ends where the next
 * field begins. The content of a number is empty. Returns NULL at the end, and for a field that is neither a
 * number nor bytes. */
static const uint8_t *field(const uint8_t *at, const uint8_t *end, uint64_t *tag, uint64_t *size)
{
	uint64_t number;

	*size = 0;
	if (!(at = varint(at, end, tag)))
		return NULL;
	if ((*tag & 7) == 0)
		return varint(at, end, &number);
	if ((*tag & 7) != 2 || !(at = varint(at, end, size)) || *size > (uint64_t)(end - at))
		return NULL;
	return at;
}

/* The first links of a dag-pb block by SHA-256, at most `most`. Field 2 of a PBNode is a link. Field 1 of a
 * link is the CID, and field 2 is the name, which is empty in a file. Source: the dag-pb specification. */
static int links_of(const uint8_t *block, int64_t size, struct link *links, int most)
{
	static const uint8_t v0[] = {0x12, DIGEST};
	const uint8_t *node, *end = block + size, *at, *cid;
	uint64_t tag, length, each;
	int count = 0, is_named;

	for (node = block; count < most && (node = field(node, end, &tag, &length)); node += length) {
		if (tag != 0x12)
			continue;
		cid = NULL;
		is_named = 0;
		for (at = node; (at = field(at, node + length, &tag, &each)); at += each) {
			if (tag == 0x0a && each == 2 + DIGEST && !memcmp(at, v0, 2)) {
				cid = at + 2;
				links[count].codec = DAG_PB;
			} else if (tag == 0x0a && each == 4 + DIGEST && at[0] == 1 && (at[1] == RAW || at[1] == DAG_PB) && !memcmp(at + 2, v0, 2)) {
				cid = at + 4;
				links[count].codec = at[1];
			} else if (tag == 0x12)
				is_named = each > 0;
		}
		if (!cid)
			continue;
		memcpy(links[count].digest, cid, DIGEST);
		links[count++].is_named = is_named;
	}
	return count;
}

/* -- ahead ----------------------------------------------------------------------------------------------- */

static struct slot *find(struct repo *repo, const uint8_t *digest, int codec)
{
	struct slot *slot;

	for (slot = repo->slots; slot < repo->slots + SLOTS; slot++)
		if (slot->state != FREE && slot->codec == codec && !memcmp(slot->digest, digest, DIGEST))
			return slot;
	return NULL;
}

/* False for a block that was missing when it was read ahead, or whose reading was given up. It may exist by
 * now, so it is read again. */
static int was_found(const struct slot *slot) { return slot && slot->state == READ && slot->found.size != MISSING; }

static void let_go(struct repo *repo, struct slot *slot)
{
	if (slot->state == READ && slot->found.bytes) {
		repo->kept -= slot->found.size;
		release(repo, slot->found.bytes);
	}
	slot->state = FREE;
}

/* Frees blocks that nobody took in time. Returns whether others are kept. */
static int forget_old(struct repo *repo)
{
	struct slot *slot;
	int left = 0;

	for (slot = repo->slots; slot < repo->slots + SLOTS; slot++)
		if (slot->state == READ && now_ns() - slot->read_at > KEPT_NS)
			let_go(repo, slot);
		else
			left |= slot->state == READ;
	return left;
}

static void *run(void *all);

/* Returns whether the thread was started. It blocks all signals, because they are for Python's main
 * thread. */
static int start(pthread_t *thread, void *(*work)(void *), void *argument)
{
	sigset_t all, before;
	int failed;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	failed = pthread_create(thread, NULL, work, argument);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return !failed;
}

/* A free slot. If there is none, the slot of the oldest block of another family that nobody has taken. So a
 * program that looks up names without opening them does not prevent read-ahead for others. NULL if there is
 * no such slot either. */
static struct slot *free_slot(struct repo *repo, int64_t family)
{
	struct slot *slot, *oldest = NULL;

	for (slot = repo->slots; slot < repo->slots + SLOTS; slot++)
		if (slot->state == FREE)
			return slot;
		else if (slot->state != READING && slot->family != family && (!oldest || slot->order < oldest->order))
			oldest = slot;
	if (oldest)
		let_go(repo, oldest);
	return oldest;
}

static struct slot *want(struct repo *repo, const uint8_t *digest, int codec, int level, int on_path, int64_t family)
{
	struct slot *slot = free_slot(repo, family);

	if (!slot)
		return NULL;
	memset(slot, 0, sizeof *slot);
	slot->state = WANTED;
	slot->codec = codec;
	slot->level = level;
	slot->on_path = on_path;
	slot->order = repo->order++;
	slot->family = family;
	memcpy(slot->digest, digest, DIGEST);
	return slot;
}

/* All threads start with the first block, so that no later one waits for a thread to start. */
static void wake(struct repo *repo)
{
	pthread_t thread;

	while (repo->threads < READ_AHEAD_THREADS && start(&thread, run, repo)) {
		pthread_detach(thread);
		repo->threads++;
	}
	pthread_cond_broadcast(&repo->work);
}

/* Called when a block that is `on_path` was read, or when a block was taken. The blocks that it links first
 * are wanted next. The lock is held. */
static void follow(struct repo *repo, const struct slot *slot)
{
	struct link links[MAX_CHILDREN + 1];
	int64_t family = repo->order;
	int each, pass, named, wanted = 0, count = slot->link_count, level = slot->level;

	memcpy(links, slot->links, sizeof links); /* `want` may use the slot for one of them */
	named = count && links[0].is_named;
	if (named) {
		level = 0;
		count = count > MAX_CHILDREN ? 0 : count;
	} else /* level 0: a program that looks up a file by its CID may want only the file's size */
		count = count && level && level < DEEPEST;
	for (pass = 0; pass < 2; pass++) /* dag-pb blocks first, because they are small */
		for (each = 0; each < count && wanted < repo->left; each++)
			if ((links[each].codec == RAW) == pass && !find(repo, links[each].digest, links[each].codec))
				wanted += !!want(repo, links[each].digest, links[each].codec, level + 1, !named, family);
	repo->left -= wanted;
	if (wanted)
		wake(repo);
}

/* Gives the block of `slot` to the caller that asks for it. */
static void take(struct repo *repo, struct slot *slot, struct found *found)
{
	struct slot *other;

	*found = slot->found;
	repo->kept -= found->bytes ? found->size : 0;
	slot->state = FREE;
	for (other = repo->slots; other < repo->slots + SLOTS; other++)
		if (other != slot && other->family == slot->family && other->state == WANTED)
			other->state = FREE;
		else if (other != slot && other->family == slot->family && other->state == READING)
			other->unwanted = 1;
	if (!slot->on_path)
		follow(repo, slot);
}

/* Reads the block that `slot` wants. If it is on the path, the blocks that it links are wanted next. The lock
 * is held, except while the block is read. */
static void fill(struct repo *repo, struct slot *slot)
{
	struct found found;

	slot->state = READING;
	pthread_mutex_unlock(&repo->lock);
	read_block(repo, slot->digest, &found, &slot->unwanted, NULL);
	if (slot->codec == DAG_PB && found.size > 0)
		slot->link_count = links_of((uint8_t *)found.bytes, found.size, slot->links, MAX_CHILDREN + 1);
	pthread_mutex_lock(&repo->lock);
	if (slot->on_path)
		follow(repo, slot);
	if (found.bytes && repo->kept + found.size > KEPT) {
		release(repo, found.bytes);
		found = (struct found){.size = MISSING};
		slot->unwanted = 1;
	}
	repo->kept += found.bytes ? found.size : 0;
	slot->found = found;
	slot->read_at = now_ns();
	slot->state = READ;
	pthread_cond_broadcast(&repo->done);
}

static struct slot *oldest_wanted(struct repo *repo)
{
	struct slot *slot, *oldest = NULL;

	for (slot = repo->slots; slot < repo->slots + SLOTS; slot++)
		if (slot->state == WANTED && (!oldest || slot->order < oldest->order))
			oldest = slot;
	return oldest;
}

static void end(struct repo *repo)
{
	struct slot *slot;

	for (slot = repo->slots; slot < repo->slots + SLOTS; slot++)
		let_go(repo, slot);
	pthread_mutex_unlock(&repo->lock);
	pthread_cond_destroy(&repo->work);
	pthread_cond_destroy(&repo->done);
	pthread_mutex_destroy(&repo->lock);
	free(repo->own);
	free(repo->folder);
	free(repo);
}

static void *run(void *all)
{
	struct repo *repo = all;
	struct timespec until;
	struct slot *slot;

	pthread_mutex_lock(&repo->lock);
	while (!repo->stopping) {
		if ((slot = oldest_wanted(repo))) {
			fill(repo, slot);
			continue;
		}
		if (forget_old(repo)) {
			clock_gettime(CLOCK_MONOTONIC, &until);
			until.tv_sec += 1;
			pthread_cond_timedwait(&repo->work, &repo->lock, &until);
		} else
			pthread_cond_wait(&repo->work, &repo->lock);
	}
	if (!--repo->threads && repo->orphaned) {
		end(repo);
		return NULL;
	}
	pthread_cond_broadcast(&repo->done);
	pthread_mutex_unlock(&repo->lock);
	return NULL;
}

/* -- for Python ------------------------------------------------------------------------------------------ */

/* The blocks in `folder`, whose folders have names of `characters` characters. NULL without memory. */
struct repo *repo_open(const char *folder, int characters, const struct sha256 *sha256)
{
	struct repo *repo = calloc(1, sizeof *repo);
	pthread_condattr_t monotonic;

	if (!repo || !(repo->folder = strdup(folder))) {
		free(repo);
		return NULL;
	}
	repo->characters = characters;
	repo->sha256 = *sha256;
	if ((repo->own = aligned_alloc(MAX_BLOCK, MAX_BLOCK))) {
		madvise(repo->own, MAX_BLOCK, MADV_HUGEPAGE);
		populate(repo->own, MAX_BLOCK);
		repo->unused = repo->own;
	}
	pthread_mutex_init(&repo->lock, NULL);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&repo->work, &monotonic);
	pthread_cond_init(&repo->done, &monotonic);
	return repo;
}

/* Ends read-ahead. The lock is held. The threads use OpenSSL, which ends with the process, so this waits for
 * them. It does not wait long if the disk does not answer. */
static void stop(struct repo *repo)
{
	struct timespec until;
	struct slot *slot;

	repo->stopping = 1;
	for (slot = repo->slots; slot < repo->slots + SLOTS; slot++)
		slot->unwanted = 1;
	pthread_cond_broadcast(&repo->work);
	clock_gettime(CLOCK_MONOTONIC, &until);
	until.tv_sec += 1;
	while (repo->threads && !pthread_cond_timedwait(&repo->done, &repo->lock, &until))
		;
}

/* For the end of a process. Nothing is freed, because another thread may still be in `repo_read`. */
void repo_stop(struct repo *repo)
{
	pthread_mutex_lock(&repo->lock);
	stop(repo);
	pthread_mutex_unlock(&repo->lock);
}

/* Call this only when no thread is in `repo_read`. */
void repo_close(struct repo *repo)
{
	pthread_mutex_lock(&repo->lock);
	stop(repo);
	repo->orphaned = repo->threads > 0; /* then the last of them frees it */
	if (repo->orphaned)
		pthread_mutex_unlock(&repo->lock);
	else
		end(repo);
}

/* Takes the block if it was read ahead, and returns 1. If no other block was asked for lately, this waits up
 * to `patience` nanoseconds until a read-ahead thread has read the block, which is sooner than a Python
 * thread would read it. With a negative `patience` the block is read ahead, but not taken. */
int repo_take(struct repo *repo, const uint8_t *digest, int codec, int64_t patience, struct found *found)
{
	struct timespec until;
	struct slot *slot;
	int64_t now = now_ns();
	int alone, taken;

	pthread_mutex_lock(&repo->lock);
	alone = now - repo->asked_at > ALONE_NS;
	repo->asked_at = now;
	repo->left = alone ? MAX_AHEAD : repo->left;
	forget_old(repo);
	slot = find(repo, digest, codec);
	if (!slot && alone && (slot = want(repo, digest, codec, 0, 1, repo->order)))
		wake(repo);
	else if (slot && slot->state != READ)
		slot->on_path = 1;
	until = (struct timespec){(now + patience) / 1000000000, (now + patience) % 1000000000};
	repo->is_slow = repo->is_slow && !alone;
	while (slot && (slot->state == WANTED || slot->state == READING) && repo->threads && patience > 0 && !repo->is_slow) {
		repo->is_slow = !!pthread_cond_timedwait(&repo->done, &repo->lock, &until);
		repo->asked_at = now_ns();
		slot = find(repo, digest, codec);
	}
	taken = patience >= 0 && was_found(slot);
	if (taken)
		take(repo, slot, found);
	pthread_mutex_unlock(&repo->lock);
	return taken;
}

static int from_base32(const char *name, size_t size, uint8_t *out, size_t room)
{
	uint32_t bits = 0;
	size_t each, have = 0, count = 0;
	int digit;

	for (each = 0; each < size; each++) {
		digit = name[each] >= 'a' && name[each] <= 'z' ? name[each] - 'a' : name[each] >= '2' && name[each] <= '7' ? name[each] - '2' + 26 : -1;
		if (digit < 0)
			return 0;
		bits = bits << 5 | digit;
		if ((have += 5) < 8)
			continue;
		if (count == room)
			return 0;
		out[count++] = bits >> (have -= 8);
	}
	return count == room;
}

static int from_base58(const char *name, size_t size, uint8_t *out, size_t room)
{
	static const char digits[] = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz";
	const char *digit;
	size_t each, byte;
	uint32_t carry;

	memset(out, 0, room);
	for (each = 0; each < size; each++) {
		if (!name[each] || !(digit = strchr(digits, name[each])))
			return 0;
		carry = digit - digits;
		for (byte = room; byte--; carry >>= 8)
			out[byte] = carry += 58u * out[byte];
		if (carry)
			return 0;
	}
	return 1;
}

/* Called when a program looks up `name` in the mount's root. If the name is the CID of a dag-pb block in its
 * usual spelling, and no block was asked for lately, the block is read ahead. If it is staged already, the
 * read is wasted. */
void repo_name(struct repo *repo, const char *name, size_t size)
{
	uint8_t cid[4 + DIGEST], *multihash = cid + 2;

	if (size == 59 && name[0] == 'b') {
		if (!from_base32(name + 1, 58, cid, sizeof cid) || cid[0] != 1 || cid[1] != DAG_PB)
			return;
	} else if (size != 46 || !from_base58(name, 46, multihash, 2 + DIGEST))
		return;
	if (multihash[0] != 0x12 || multihash[1] != DIGEST)
		return;
	pthread_mutex_lock(&repo->lock);
	forget_old(repo);
	if (!repo->is_blocked && now_ns() - repo->asked_at > ALONE_NS && !find(repo, multihash + 2, DAG_PB) && want(repo, multihash + 2, DAG_PB, 0, 0, repo->order))
		wake(repo);
	pthread_mutex_unlock(&repo->lock);
}

/* Sets whether lookups of names read nothing ahead, because their content may be blocked. */
void repo_block(struct repo *repo, int is_blocked)
{
	pthread_mutex_lock(&repo->lock);
	repo->is_blocked = is_blocked;
	pthread_mutex_unlock(&repo->lock);
}

/* Reads the block, or waits for the thread that reads it ahead. The caller frees the bytes of `found` by
 * `repo_free`. */
void repo_read(struct repo *repo, const uint8_t *digest, int codec, struct found *found)
{
	struct slot *slot;
	int taken;

	pthread_mutex_lock(&repo->lock);
	while ((slot = find(repo, digest, codec)) && slot->state == READING)
		pthread_cond_wait(&repo->done, &repo->lock);
	taken = was_found(slot);
	if (taken)
		take(repo, slot, found);
	else if (slot)
		let_go(repo, slot);
	pthread_mutex_unlock(&repo->lock);
	if (!taken)
		read_block(repo, digest, found, NULL, NULL);
}

/* What the threads of one call share. */
struct many {
	struct repo *repo;
	const uint8_t *digests;
	struct found *found;
	int count;
	atomic_int next;
	atomic_llong room;
};

static void *read_next(void *all)
{
	struct many *many = all;
	int each;

	while ((each = atomic_fetch_add(&many->next, 1)) < many->count)
		read_block(many->repo, many->digests + each * DIGEST, many->found + each, NULL, each ? &many->room : NULL);
	return NULL;
}

/* Reads up to `count` blocks into `found`. `digests` holds their digests, one after the other. Reads the
 * first block, and as many of the next ones as fit into `room` bytes together. Returns how many of `found`
 * are filled before the first block without room. The caller frees the bytes of all by `repo_free_many`. */
int repo_read_many(struct repo *repo, const uint8_t *digests, int count, int64_t room, struct found *found)
{
	struct many many = {repo, digests, found, count, 0, room};
	pthread_t threads[READERS - 1];
	int each, started = 0;

	while (started < READERS - 1 && started + 1 < count && start(&threads[started], read_next, &many))
		started++;
	read_next(&many);
	while (started)
		pthread_join(threads[--started], NULL);
	for (each = 0; each < count && found[each].size != NO_ROOM; each++)
		;
	return each;
}

void repo_free(struct repo *repo, char *bytes) { release(repo, bytes); }

void repo_free_many(struct repo *repo, struct found *found, int count)
{
	for (; count; count--, found++)
		release(repo, found->bytes);
}
