/* What stands at the door (porter.c), and those who answer there. */
#ifndef PORTER_H
#define PORTER_H

#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>

/* Answers a request: `size` bytes of `body`. 0, or errno where the caller is gone. */
int porter_reply(int device, uint64_t unique, const void *body, size_t size);

/* Each: whether the request, of which `size` bytes came, was theirs, and has its answer. */
int opens_answered(int device, const struct fuse_in_header *request, size_t size);
int reads_answered(int device, const struct fuse_in_header *request, size_t size);

#endif
