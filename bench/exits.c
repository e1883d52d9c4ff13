/*
 * The exits of bench/exits.py by themselves: the same guest on /dev/kvm, served by a loop in C.
 *
 *     exits IMAGE WARMUP EXITS     prints the nanoseconds of processor time that EXITS exits took, after WARMUP others
 *
 * IMAGE is struct kvm_regs, struct kvm_sregs, and the guest's memory, which lies at 0.
 */
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define CPUID_ENTRIES 256

static long check(const char *what, long result)
{
	if (result < 0) {
		fprintf(stderr, "%s: %s\n", what, strerror(errno));
		exit(1);
	}
	return result;
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec * UINT64_C(1000000000) + t.tv_nsec;
}

static uint64_t written, answer = 0x5a;

/* Run the guest for `count` exits. */
static void serve(int vcpu, struct kvm_run *run, long count)
{
	while (count--) {
		check("KVM_RUN", ioctl(vcpu, KVM_RUN, 0));
		switch (run->exit_reason) {
		case KVM_EXIT_IO: {
			uint8_t *data = (uint8_t *)run + run->io.data_offset;
			size_t size = (size_t)run->io.size * run->io.count;
			if (run->io.direction == KVM_EXIT_IO_OUT)
				memcpy(&written, data, size < 8 ? size : 8);
			else
				memcpy(data, &answer, size < 8 ? size : 8);
			break;
		}
		case KVM_EXIT_MMIO:
			if (run->mmio.is_write)
				memcpy(&written, run->mmio.data, run->mmio.len);
			else
				memcpy(run->mmio.data, &answer, run->mmio.len);
			break;
		default:
			fprintf(stderr, "exit reason %u\n", run->exit_reason);
			exit(1);
		}
	}
}

int main(int argc, char **argv)
{
	struct kvm_regs regs;
	struct kvm_sregs sregs;
	struct stat status;
	if (argc != 4) {
		fprintf(stderr, "usage: exits IMAGE WARMUP EXITS\n");
		return 2;
	}
	int image = check(argv[1], open(argv[1], O_RDONLY));
	check("fstat", fstat(image, &status));
	if (read(image, &regs, sizeof regs) != sizeof regs || read(image, &sregs, sizeof sregs) != sizeof sregs) {
		fprintf(stderr, "%s: too short\n", argv[1]);
		return 1;
	}
	size_t size = status.st_size - sizeof regs - sizeof sregs;
	char *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || read(image, memory, size) != (ssize_t)size) {
		fprintf(stderr, "%s: memory of %zu bytes\n", argv[1], size);
		return 1;
	}

	int kvm = check("/dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC));
	int vm = check("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));
	struct kvm_userspace_memory_region region = {.memory_size = size, .userspace_addr = (uintptr_t)memory};
	check("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	int vcpu = check("KVM_CREATE_VCPU", ioctl(vm, KVM_CREATE_VCPU, 0));
	size_t run_size = check("KVM_GET_VCPU_MMAP_SIZE", ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	struct kvm_run *run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
	if (run == MAP_FAILED)
		check("mmap of the vCPU", -1);
	struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + CPUID_ENTRIES * sizeof cpuid->entries[0]);
	cpuid->nent = CPUID_ENTRIES;
	check("KVM_GET_SUPPORTED_CPUID", ioctl(kvm, KVM_GET_SUPPORTED_CPUID, cpuid));
	check("KVM_SET_CPUID2", ioctl(vcpu, KVM_SET_CPUID2, cpuid));
	check("KVM_SET_SREGS", ioctl(vcpu, KVM_SET_SREGS, &sregs));
	check("KVM_SET_REGS", ioctl(vcpu, KVM_SET_REGS, &regs));

	serve(vcpu, run, atol(argv[2]));
	uint64_t start = now_ns();
	serve(vcpu, run, atol(argv[3]));
	printf("%" PRIu64 "\n", now_ns() - start);
	return 0;
}
