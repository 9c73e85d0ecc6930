/*
 * stable DEVICE...
 *
 * Prints "ready", waits for a line with a number, and then writes to all the disks with direct I/O for ever, in
 * batches, a process for each. It prints "stable DISK BATCH" when a batch, and with it all before, is stable:
 * for a host that is killed meanwhile and has to find all of that again. What each batch writes follows from
 * its seed, DISKS * number + DISK: `stable_writes.py` says the same. While one batch is flushed, the writes of the next
 * are in flight; the two work on different halves of the disk, so that no two writes race for a place.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <linux/fs.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#define BLOCK 4096
#define SLICES 16
#define SLICE_BLOCKS 1024 /* in each half; a batch writes once to a slice at most */
#define MOST_WRITES 8
#define MOST_BLOCKS 8
#define RWF_DSYNC_FLAG 2

struct batch {
	int count, stable; /* writes in flight; whether they are stable when they are done */
	struct iocb cbs[MOST_WRITES];
	char *data[MOST_WRITES];
};

static int fd;
static uint64_t seed, random_word;
static aio_context_t context;

static void fail(const char *what)
{
	printf("complaint: %s: %m\n", what);
	exit(1);
}

static uint32_t any(uint32_t limit)
{
	random_word ^= random_word << 13;
	random_word ^= random_word >> 7;
	random_word ^= random_word << 17;
	return (random_word >> 11) % limit;
}

static void begin(struct batch *batch, uint64_t number)
{
	struct iocb *list[MOST_WRITES];
	uint32_t what = any(8), half = (number & 1) * SLICES * SLICE_BLOCKS;

	batch->count = 0;
	batch->stable = what == 1;
	if (!what) {
		uint64_t slice = any(SLICES), first = half + slice * SLICE_BLOCKS + 256 * any(3);
		uint64_t range[2] = { first * BLOCK, 512 * BLOCK };

		if (ioctl(fd, BLKDISCARD, range))
			fail("BLKDISCARD");
		return;
	}
	batch->count = 1 + any(MOST_WRITES);
	for (int i = 0; i < batch->count; i++) {
		uint32_t blocks = 1 + any(MOST_BLOCKS), slice = 2 * i + any(2);
		uint64_t first = half + slice * SLICE_BLOCKS + any(SLICE_BLOCKS - blocks + 1);
		uint64_t *word = (uint64_t *)batch->data[i];

		for (uint32_t at = 0; at < blocks * BLOCK; at += 16) {
			*word++ = first + at / BLOCK;
			*word++ = seed << 32 | number;
		}
		memset(&batch->cbs[i], 0, sizeof(batch->cbs[i]));
		batch->cbs[i].aio_data = number;
		batch->cbs[i].aio_fildes = fd;
		batch->cbs[i].aio_lio_opcode = IOCB_CMD_PWRITE;
		batch->cbs[i].aio_buf = (uintptr_t)batch->data[i];
		batch->cbs[i].aio_nbytes = blocks * BLOCK;
		batch->cbs[i].aio_offset = first * BLOCK;
		batch->cbs[i].aio_rw_flags = batch->stable ? RWF_DSYNC_FLAG : 0;
		list[i] = &batch->cbs[i];
	}
	if (syscall(SYS_io_submit, context, batch->count, list) != batch->count)
		fail("io_submit");
}

/* Those of the next batch may end first: both are counted. */
static void wait_for(struct batch *batch, struct batch *next, uint64_t number)
{
	while (batch->count) {
		struct io_event events[2 * MOST_WRITES];
		int got = syscall(SYS_io_getevents, context, 1, 2 * MOST_WRITES, events, NULL);

		if (got < 0)
			fail("io_getevents");
		for (int i = 0; i < got; i++) {
			struct iocb *cb = (struct iocb *)(uintptr_t)events[i].obj;

			if (events[i].res != (int64_t)cb->aio_nbytes) {
				printf("complaint: a write ended with %lld\n", (long long)events[i].res);
				exit(1);
			}
			(events[i].data == number ? batch : next)->count--;
		}
	}
}

static void work(struct batch *batches, int disk)
{
	random_word = 88172645463325252ull ^ seed * 0x9e3779b97f4a7c15ull;
	begin(&batches[1], 1);
	for (uint64_t number = 1;; number++) {
		struct batch *batch = &batches[number % 2], *next = &batches[(number + 1) % 2];

		begin(next, number + 1);
		wait_for(batch, next, number);
		if (!batch->stable && fsync(fd))
			fail("fsync");
		printf("stable %d %llu\n", disk, (unsigned long long)number);
		tcdrain(1); /* whoever hears of this batch last must not be far behind */
	}
}

/* All that a disk needs is there before "ready": a copy of this guest has nothing to do but to write. */
static void serve(const char *device, int disks, int disk, int from, int ready)
{
	static struct batch batches[2];

	fd = open(device, O_RDWR | O_DIRECT | O_CLOEXEC);
	if (fd < 0)
		fail(device);
	if (syscall(SYS_io_setup, 2 * MOST_WRITES, &context))
		fail("io_setup");
	for (int i = 0; i < 2 * MOST_WRITES; i++) {
		char **data = &batches[i % 2].data[i / 2];

		if (posix_memalign((void **)data, BLOCK, MOST_BLOCKS * BLOCK))
			fail("memory");
		memset(*data, 1, MOST_BLOCKS * BLOCK);
	}
	if (write(ready, "", 1) != 1 || read(from, &seed, sizeof(seed)) != sizeof(seed))
		fail("pipe");
	seed = seed * disks + disk;
	work(batches, disk);
}

int main(int argc, char **argv)
{
	int disks = argc - 1, to[8], ready[2], ends[2];
	char line[32];

	setvbuf(stdout, NULL, _IOLBF, 256);
	if (disks < 1 || disks > 8 || pipe(ready))
		return 2;
	for (int disk = 0; disk < disks; disk++) {
		if (pipe(ends))
			fail("pipe");
		if (!fork())
			serve(argv[1 + disk], disks, disk, ends[0], ready[1]);
		to[disk] = ends[1];
	}
	for (int disk = 0; disk < disks; disk++)
		if (read(ready[0], line, 1) != 1)
			fail("pipe");
	printf("ready\n");
	if (!fgets(line, sizeof(line), stdin))
		fail("standard input");
	seed = strtoull(line, NULL, 10);
	for (int disk = 0; disk < disks; disk++)
		if (write(to[disk], &seed, sizeof(seed)) != sizeof(seed))
			fail("pipe");
	for (;;)
		pause();
}
