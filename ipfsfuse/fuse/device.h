/* What the device thread (device.c) and the two tables that it answers from (opens.c, reads.c) share. */
#ifndef IPFSFUSE_DEVICE_H
#define IPFSFUSE_DEVICE_H

#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>

enum reply {
	REPLY_SENT,   /* The kernel has the answer. */
	REPLY_GONE,   /* Nobody waits for the answer any more. */
	REPLY_FAILED, /* The answer could not be sent, and the request still waits: pass it on to Python. */
};

/* Answers the request `unique` with `size` bytes of `body`. Waits at most about 0.1 s. */
enum reply device_reply(int device, uint64_t unique, const void *body, size_t size);

/* Each returns whether it has dealt with the request, which has `size` bytes. If not, Python must. */
int opens_answer(int device, const struct fuse_in_header *request, size_t size);
int reads_answer(int device, const struct fuse_in_header *request, size_t size);

void opens_clear(void);

#endif
