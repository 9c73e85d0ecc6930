/*
 * diskio DEVICE read|write seq|random SIZE DEPTH MILLISECONDS
 *
 * Direct I/O on a block device by Linux's own AIO: DEPTH requests of SIZE bytes are in flight until the
 * time is over. Prints one line: requests, bytes, microseconds, and the middle and the 99th of their times.
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
#include <time.h>
#include <unistd.h>

#define MOST_DEPTH 256
#define MOST_TIMES (1 << 20)

static uint32_t times[MOST_TIMES];

static int fail(const char *what)
{
	perror(what);
	return 1;
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000ull + t.tv_nsec / 1000;
}

static int by_size(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

int main(int argc, char **argv)
{
	static struct iocb cbs[MOST_DEPTH];
	static struct io_event events[MOST_DEPTH];
	static uint64_t began[MOST_DEPTH];
	uint64_t device_bytes, size, slots, next = 0, random = 88172645463325252ull, done = 0, start, end;
	int fd, depth, write, is_random, in_flight = 0;
	aio_context_t context = 0;
	char *memory;

	if (argc != 7) {
		fprintf(stderr, "usage: diskio DEVICE read|write seq|random SIZE DEPTH MILLISECONDS\n");
		return 2;
	}
	write = !strcmp(argv[2], "write");
	is_random = !strcmp(argv[3], "random");
	size = strtoull(argv[4], NULL, 10);
	depth = atoi(argv[5]);
	if (depth < 1 || depth > MOST_DEPTH || !size || size % 512)
		return 2;
	fd = open(argv[1], (write ? O_RDWR : O_RDONLY) | O_DIRECT | O_CLOEXEC);
	if (fd < 0 || ioctl(fd, BLKGETSIZE64, &device_bytes))
		return fail(argv[1]);
	slots = device_bytes / size;
	if (!slots || posix_memalign((void **)&memory, 4096, size * depth))
		return fail("memory");
	memset(memory, 0x5a, size * depth);
	if (syscall(SYS_io_setup, depth, &context))
		return fail("io_setup");
	start = now();
	end = start + strtoull(argv[6], NULL, 10) * 1000;
	for (;;) {
		struct iocb *batch[MOST_DEPTH];
		int n = 0, got;
		uint64_t at = now();

		for (int i = 0; i < depth && at < end; i++) {
			uint64_t slot;

			if (began[i])
				continue;
			random ^= random << 13;
			random ^= random >> 7;
			random ^= random << 17;
			slot = is_random ? random % slots : next++ % slots;
			memset(&cbs[i], 0, sizeof(cbs[i]));
			cbs[i].aio_data = i;
			cbs[i].aio_lio_opcode = write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
			cbs[i].aio_fildes = fd;
			cbs[i].aio_buf = (uintptr_t)(memory + size * i);
			cbs[i].aio_nbytes = size;
			cbs[i].aio_offset = slot * size;
			began[i] = at;
			batch[n++] = &cbs[i];
		}
		if (n && syscall(SYS_io_submit, context, n, batch) != n)
			return fail("io_submit");
		in_flight += n;
		if (!in_flight)
			break;
		got = syscall(SYS_io_getevents, context, 1, depth, events, NULL);
		if (got < 1)
			return fail("io_getevents");
		at = now();
		for (int i = 0; i < got; i++) {
			if (events[i].res != (int64_t)size) {
				fprintf(stderr, "diskio: a request ended with %lld\n", (long long)events[i].res);
				return 1;
			}
			if (done < MOST_TIMES)
				times[done] = at - began[events[i].data];
			began[events[i].data] = 0;
			done++;
		}
		in_flight -= got;
	}
	end = now();
	start = end - start;
	size *= done;
	slots = done < MOST_TIMES ? done : MOST_TIMES;
	qsort(times, slots, sizeof(times[0]), by_size);
	printf("diskio: %llu requests %llu bytes %llu us, middle %u us, 99th %u us\n", (unsigned long long)done,
	       (unsigned long long)size, (unsigned long long)start, slots ? times[slots / 2] : 0,
	       slots ? times[slots * 99 / 100] : 0);
	return 0;
}
