/*
 * kexec load KERNEL INITRD CMDLINE    the kernel that `kexec go` starts
 * kexec crash KERNEL INITRD CMDLINE   the kernel that starts when this one panics (crashkernel=)
 * kexec go                            start it, as reboot(8) would: drivers leave first
 *
 * Why: busybox has no kexec, and kexec-tools is not static.
 */
#include <fcntl.h>
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

static int fail(const char *what)
{
	perror(what);
	return 1;
}

static int load(char **argv, unsigned long flags)
{
	int kernel = open(argv[0], O_RDONLY | O_CLOEXEC);
	int initrd = open(argv[1], O_RDONLY | O_CLOEXEC);

	if (kernel < 0)
		return fail(argv[0]);
	if (initrd < 0)
		return fail(argv[1]);
	if (syscall(SYS_kexec_file_load, kernel, initrd, strlen(argv[2]) + 1, argv[2], flags))
		return fail("kexec_file_load");
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 5 && !strcmp(argv[1], "load"))
		return load(argv + 2, 0);
	if (argc == 5 && !strcmp(argv[1], "crash"))
		return load(argv + 2, KEXEC_FILE_ON_CRASH);
	if (argc == 2 && !strcmp(argv[1], "go")) {
		sync();
		syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, 0);
		return fail("reboot");
	}
	fprintf(stderr, "usage: kexec load|crash KERNEL INITRD CMDLINE | kexec go\n");
	return 2;
}
