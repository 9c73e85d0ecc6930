/*
 * verify DEVICE JOBS DEPTH BYTES MILLISECONDS
 *
 * JOBS processes work on BYTES each of a block device, with direct I/O by Linux's AIO, DEPTH requests of 4 to
 * 64 KiB in flight. Each sector that is written says where it is and which write it is of, and each read is
 * compared with what was written last. Beside them every job flushes, and a process of its own discards and
 * zeroes ranges that the job leaves alone meanwhile. In the end all is flushed and read once more.
 * Prints a line for each job; the exit status is 1 if anything was not as it must be.
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
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 4096
#define SECTOR 512
#define MOST_DEPTH 64
#define MOST_BLOCKS 16
#define UNKNOWN 0xffffffffu

struct order {
	uint64_t at, bytes;
	int zero;
};

struct slot {
	int used, op;
	uint32_t first, blocks, generation;
	char *data;
};

static int fd, job;
static uint64_t base, random_word = 88172645463325252ull;
static uint32_t *generations; /* of each block: which write, 0 zeros, UNKNOWN after a discard */
static char *busy;
static long writes, reads, flushes, discards, zeroes;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000ull + t.tv_nsec / 1000000;
}

static uint32_t any(uint32_t limit)
{
	random_word ^= random_word << 13;
	random_word ^= random_word >> 7;
	random_word ^= random_word << 17;
	return (random_word >> 11) % limit;
}

static uint64_t word_of(uint64_t position, uint32_t generation)
{
	return generation ? (position / SECTOR) << 32 ^ generation * 0x9e3779b97f4a7c15ull : 0;
}

static void fill(char *data, uint32_t first, uint32_t blocks, uint32_t generation)
{
	uint64_t position = base + (uint64_t)first * BLOCK;

	for (uint32_t at = 0; at < blocks * BLOCK; at += 8)
		*(uint64_t *)(data + at) = word_of(position + at, generation) + at % SECTOR;
}

static void compare(const char *data, uint32_t first, uint32_t blocks)
{
	for (uint32_t i = 0; i < blocks; i++) {
		uint32_t generation = generations[first + i];
		uint64_t position = base + (uint64_t)(first + i) * BLOCK;

		for (uint32_t at = 0; generation != UNKNOWN && at < BLOCK; at += 8) {
			uint64_t found = *(const uint64_t *)(data + i * BLOCK + at);
			uint64_t wanted = word_of(position + at, generation) + (generation ? at % SECTOR : 0);

			if (found != wanted) {
				printf("verify: job %d: at %#llx of write %u: %#llx in place of %#llx\n", job,
				       (unsigned long long)(position + at), generation, (unsigned long long)found,
				       (unsigned long long)wanted);
				exit(1);
			}
		}
	}
}

/* Discards and zeroes what it is told; says when it has. */
static void serve(int in, int out)
{
	struct order order;

	while (read(in, &order, sizeof(order)) == sizeof(order)) {
		uint64_t range[2] = { order.at, order.bytes };

		if (ioctl(fd, order.zero ? BLKZEROOUT : BLKDISCARD, range))
			fail(order.zero ? "BLKZEROOUT" : "BLKDISCARD");
		if (write(out, "", 1) != 1)
			fail("pipe");
	}
	exit(0);
}

static int take(uint32_t first, uint32_t blocks)
{
	if (memchr(busy + first, 1, blocks))
		return 0;
	memset(busy + first, 1, blocks);
	return 1;
}

static void done_with(uint32_t first, uint32_t blocks)
{
	memset(busy + first, 0, blocks);
}

/* What was discarded or zeroed is the job's again; 0, as nothing is away now. */
static uint32_t came_back(uint32_t first, uint32_t blocks, int zero)
{
	for (uint32_t at = 0; at < blocks; at++)
		generations[first + at] = zero ? 0 : UNKNOWN;
	done_with(first, blocks);
	zero ? zeroes++ : discards++;
	return 0;
}

static void work(int depth, uint32_t total, uint64_t milliseconds)
{
	static struct slot slots[MOST_DEPTH];
	static struct iocb cbs[MOST_DEPTH];
	struct io_event events[MOST_DEPTH];
	uint32_t generation = 0, away_first = 0, away_blocks = 0;
	int to[2], from[2], in_flight = 0, zero = 0;
	aio_context_t context = 0;
	uint64_t end = now() + milliseconds;
	char byte, *data;
	pid_t child;

	if (pipe(to) || pipe2(from, O_NONBLOCK))
		fail("pipe");
	child = fork();
	if (!child) {
		close(to[1]);
		fcntl(from[1], F_SETFL, 0);
		serve(to[0], from[1]);
	}
	if (syscall(SYS_io_setup, depth, &context))
		fail("io_setup");
	for (int i = 0; i < depth; i++)
		if (posix_memalign((void **)&slots[i].data, BLOCK, MOST_BLOCKS * BLOCK))
			fail("memory");
	while (in_flight || now() < end) {
		struct iocb *batch[MOST_DEPTH];
		int n = 0, got;

		for (int i = 0; i < depth && now() < end; i++) {
			struct slot *one = &slots[i];
			uint32_t blocks = 1 + any(MOST_BLOCKS), first = any(total - blocks + 1), what = any(100);

			if (one->used)
				continue;
			memset(&cbs[i], 0, sizeof(cbs[i]));
			cbs[i].aio_data = i;
			cbs[i].aio_fildes = fd;
			if (what < 4) {
				one->op = IOCB_CMD_FSYNC;
			} else {
				if (!take(first, blocks))
					continue;
				if (what < 10 && !away_blocks) {
					struct order order = { base + (uint64_t)first * BLOCK, blocks * BLOCK, what < 7 };

					away_first = first;
					away_blocks = blocks;
					zero = order.zero;
					if (write(to[1], &order, sizeof(order)) != sizeof(order))
						fail("pipe");
					continue;
				}
				one->op = what < 55 ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
				one->first = first;
				one->blocks = blocks;
				if (one->op == IOCB_CMD_PWRITE) {
					one->generation = ++generation;
					fill(one->data, first, blocks, generation);
				}
				cbs[i].aio_buf = (uintptr_t)one->data;
				cbs[i].aio_nbytes = blocks * BLOCK;
				cbs[i].aio_offset = base + (uint64_t)first * BLOCK;
			}
			cbs[i].aio_lio_opcode = one->op;
			one->used = 1;
			batch[n++] = &cbs[i];
		}
		if (n && syscall(SYS_io_submit, context, n, batch) != n)
			fail("io_submit");
		in_flight += n;
		got = in_flight ? syscall(SYS_io_getevents, context, 1, depth, events, NULL) : 0;
		if (got < 0)
			fail("io_getevents");
		for (int i = 0; i < got; i++) {
			struct slot *one = &slots[events[i].data];
			int64_t wanted = one->op == IOCB_CMD_FSYNC ? 0 : (int64_t)one->blocks * BLOCK;

			if (events[i].res != wanted) {
				printf("verify: job %d: operation %d ended with %lld\n", job, one->op,
				       (long long)events[i].res);
				exit(1);
			}
			one->used = 0;
			in_flight--;
			if (one->op == IOCB_CMD_FSYNC) {
				flushes++;
				continue;
			}
			if (one->op == IOCB_CMD_PREAD) {
				compare(one->data, one->first, one->blocks);
				reads++;
			} else {
				for (uint32_t at = 0; at < one->blocks; at++)
					generations[one->first + at] = one->generation;
				writes++;
			}
			done_with(one->first, one->blocks);
		}
		if (away_blocks && read(from[0], &byte, 1) == 1)
			away_blocks = came_back(away_first, away_blocks, zero);
	}
	fcntl(from[0], F_SETFL, 0);
	if (away_blocks && read(from[0], &byte, 1) != 1)
		fail("the process that discards");
	if (away_blocks)
		came_back(away_first, away_blocks, zero);
	close(to[1]);
	if (waitpid(child, &in_flight, 0) != child || in_flight)
		fail("the process that discards");
	if (fsync(fd))
		fail("fsync");
	data = slots[0].data;
	for (uint32_t first = 0; first < total; first += MOST_BLOCKS) {
		uint32_t blocks = total - first < MOST_BLOCKS ? total - first : MOST_BLOCKS;

		if (pread(fd, data, blocks * BLOCK, base + (uint64_t)first * BLOCK) != (ssize_t)blocks * BLOCK)
			fail("pread");
		compare(data, first, blocks);
	}
	printf("verify: job %d: %ld writes %ld reads %ld flushes %ld discards %ld zeroes\n", job, writes, reads,
	       flushes, discards, zeroes);
}

int main(int argc, char **argv)
{
	uint64_t bytes, milliseconds;
	int jobs, depth, status, bad = 0;

	if (argc != 6) {
		fprintf(stderr, "usage: verify DEVICE JOBS DEPTH BYTES MILLISECONDS\n");
		return 2;
	}
	jobs = atoi(argv[2]);
	depth = atoi(argv[3]);
	bytes = strtoull(argv[4], NULL, 10);
	milliseconds = strtoull(argv[5], NULL, 10);
	if (jobs < 1 || depth < 1 || depth > MOST_DEPTH || bytes < MOST_BLOCKS * BLOCK || bytes % BLOCK)
		return 2;
	fd = open(argv[1], O_RDWR | O_DIRECT | O_CLOEXEC);
	if (fd < 0)
		fail(argv[1]);
	fflush(stdout);
	for (job = 0; job < jobs; job++) {
		if (fork())
			continue;
		base = job * bytes;
		random_word += job * 0x9e3779b97f4a7c15ull;
		generations = malloc(bytes / BLOCK * sizeof(*generations));
		busy = calloc(bytes / BLOCK, 1);
		if (!generations || !busy)
			fail("memory");
		memset(generations, 0xff, bytes / BLOCK * sizeof(*generations));
		work(depth, bytes / BLOCK, milliseconds);
		fflush(stdout);
		_exit(0);
	}
	while (wait(&status) > 0)
		bad |= status;
	return bad != 0;
}
