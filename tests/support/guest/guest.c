/* A guest of a few kilobytes for tests of VMMs: a line interpreter on the first serial port.
 *
 * It prints HELLO, echoes what is typed like a terminal and obeys these lines:
 *
 *   echo TEXT   prints TEXT                            exit, q    resets the machine, which ends its VMM
 *   m MIB       adds one to a counter and writes as    c          prints the counter: COUNT n
 *               many MiB of memory; prints COUNT n     p          triple fault
 *   w TEXT      writes TEXT to the disk's first sector r          prints what is there: DISK TEXT
 *   say TEXT    prints TEXT, and resets
 *   args        prints the kernel command line         deaf       leaves Ctrl-Alt-Del unheard from now on
 *   noise N     misuses the disk N times, which its VMM may complain of each time; prints QUIET
 *   mem         prints the end of the memory map: MEM  hang       stops, with interrupts off
 *               and a number of KiB
 *
 * On the command line, run="LINE" is a line that is obeyed at the start. Ctrl-Alt-Del (what VMMs send to ask for the
 * end) prints BYE and resets. Everything is driven by interrupts: idle, it halts.
 */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

extern u8 vectors[];
static volatile u64 idt[48 * 2] __attribute__((aligned(16)));

static volatile u8 ring[4096];
static volatile u32 ring_in, ring_out;
static volatile int deaf, asked_to_end;
static u64 counter;
static const char *arguments = "";
static const u8 *zero_page;

static void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port)); }
static u8 inb(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }

/* Serial port, at 0x3f8 with interrupt 4. */
static void put(char c) { outb(0x3f8, (u8)c); }
static void print(const char *text) { while (*text) put(*text++); }
static void print_number(u64 value)
{
	char digits[24];
	int n = 0;
	do { digits[n++] = (char)('0' + value % 10); value /= 10; } while (value);
	while (n) put(digits[--n]);
}

static void reset(void)
{
	outb(0x64, 0xfe);
	for (;;) __asm__ volatile("cli; hlt");
}

static void take_typed(void)
{
	while (inb(0x3fd) & 1) {
		ring[ring_in % sizeof ring] = inb(0x3f8);
		ring_in++;
	}
}

void guest_interrupt(u64 vector)
{
	if (vector < 32) {
		print("FAULT ");
		print_number(vector);
		print("\r\n");
		reset();
	}
	if (vector == 0x24) take_typed();
	if (vector == 0x21)
		/* Firecracker sends codes of set 2, others of set 1: Delete is 0x71 or 0x53. */
		while (inb(0x64) & 1) {
			u8 code = inb(0x60);
			if ((code == 0x71 || code == 0x53) && !deaf)
				asked_to_end = 1;
		}
	if (vector >= 40) outb(0xa0, 0x20);
	outb(0x20, 0x20);
}

static void set_up_interrupts(void)
{
	struct { u16 limit; u64 base; } __attribute__((packed)) table = { sizeof idt - 1, (u64)idt };
	u16 code;
	__asm__ volatile("mov %%cs, %0" : "=r"(code));
	for (int i = 0; i < 48; i++) {
		u64 entry = (u64)vectors + 16 * (u64)i;
		idt[2 * i] = (entry & 0xffff) | (u64)code << 16 | 0x8e0000000000UL | (entry >> 16 & 0xffff) << 48;
		idt[2 * i + 1] = entry >> 32;
	}
	__asm__ volatile("lidt %0" : : "m"(table));
	/* The two interrupt controllers: vectors from 0x20; only keyboard and serial port get through. */
	outb(0x20, 0x11); outb(0x21, 0x20); outb(0x21, 0x04); outb(0x21, 0x01);
	outb(0xa0, 0x11); outb(0xa1, 0x28); outb(0xa1, 0x02); outb(0xa1, 0x01);
	outb(0x21, 0xed); outb(0xa1, 0xff);
	outb(0x3f9, 1);
	/* What was typed before made no interrupt. */
	take_typed();
}

/* Text. */
static int starts(const char *text, const char *with)
{
	while (*with) if (*text++ != *with++) return 0;
	return 1;
}
static int equal(const char *a, const char *b) { while (*a && *a == *b) a++, b++; return *a == *b; }
static const char *find(const char *text, const char *what)
{
	for (; *text; text++) if (starts(text, what)) return text;
	return 0;
}
static u64 number(const char *text)
{
	u64 value = 0;
	while (*text >= '0' && *text <= '9') value = value * 10 + (u64)(*text++ - '0');
	return value;
}

/* The first virtio disk: MMIO registers at the address that the command line tells, one request at a time, polled. */
struct descriptor { u64 address; u32 length; u16 flags, next; };
static struct {
	struct descriptor descriptors[4] __attribute__((aligned(4096)));
	u16 available_flags, available_index, available[4];
	u16 used_flags __attribute__((aligned(4096)));
	volatile u16 used_index;
	struct { u32 id, length; } used[4];
} queue __attribute__((aligned(4096)));
static struct { u32 type, reserved; u64 sector; } request;
static u8 sector[512] __attribute__((aligned(512)));
static volatile u8 request_status;
static volatile u32 *disk;

/* VMMs map the first gigabyte. The registers of devices are in the fourth. */
static void map_devices(void)
{
	static u64 directory[512] __attribute__((aligned(4096)));
	u64 top;
	__asm__ volatile("mov %%cr3, %0" : "=r"(top));
	u64 *pointers = (u64 *)(*(u64 *)(top & ~0xfffUL) & 0xffffffffff000UL);
	if (pointers[3] & 1) return;
	for (u64 i = 0; i < 512; i++) directory[i] = 0xc0000000UL + (i << 21) + 0x83;
	pointers[3] = (u64)directory | 3;
	__asm__ volatile("mov %0, %%cr3" : : "r"(top) : "memory");
}

static int disk_opens(void)
{
	const char *at = arguments;

	map_devices();

	while ((at = find(at, "virtio_mmio.device=")) != 0) {
		u64 base = 0;
		at = find(at, "@0x");
		if (!at) return 0;
		for (at += 3;; at++) {
			u8 c = (u8)*at;
			if (c >= '0' && c <= '9') base = base * 16 + c - '0';
			else if (c >= 'a' && c <= 'f') base = base * 16 + c - 'a' + 10;
			else break;
		}
		volatile u32 *registers = (volatile u32 *)base;
		if (registers[0] != 0x74726976 || registers[2] != 2) continue;
		registers[0x70 / 4] = 0;
		registers[0x70 / 4] = 1;
		registers[0x70 / 4] = 1 | 2;
		registers[0x24 / 4] = 1; registers[0x20 / 4] = 1; /* VERSION_1, and nothing else */
		registers[0x24 / 4] = 0; registers[0x20 / 4] = 0;
		registers[0x70 / 4] = 1 | 2 | 8;
		registers[0x30 / 4] = 0;
		registers[0x38 / 4] = 4;
		registers[0x80 / 4] = (u32)(u64)queue.descriptors; registers[0x84 / 4] = 0;
		registers[0x90 / 4] = (u32)(u64)&queue.available_flags; registers[0x94 / 4] = 0;
		registers[0xa0 / 4] = (u32)(u64)&queue.used_flags; registers[0xa4 / 4] = 0;
		registers[0x44 / 4] = 1;
		registers[0x70 / 4] = 1 | 2 | 8 | 4;
		disk = registers;
		return 1;
	}
	return 0;
}

static int transfer(int write)
{
	u16 before = queue.used_index;
	if (!disk && !disk_opens()) { print("NO DISK\r\n"); return 0; }
	request.type = (u32)write;
	request.sector = 0;
	request_status = 255;
	queue.descriptors[0] = (struct descriptor){ (u64)&request, 16, 1, 1 };
	queue.descriptors[1] = (struct descriptor){ (u64)sector, 512, write ? 1 : 3, 2 };
	queue.descriptors[2] = (struct descriptor){ (u64)&request_status, 1, 2, 0 };
	queue.available[queue.available_index % 4] = 0;
	__asm__ volatile("mfence" : : : "memory");
	queue.available_index++;
	__asm__ volatile("mfence" : : : "memory");
	disk[0x50 / 4] = 0;
	while (queue.used_index == before) __asm__ volatile("pause");
	disk[0x64 / 4] = disk[0x60 / 4];
	if (request_status) { print("DISK ERROR\r\n"); return 0; }
	return 1;
}

static void dirty(u64 mebibytes)
{
	for (u64 page = 0; page < mebibytes * 256; page++)
		*(volatile u64 *)(0x2000000UL + page * 4096) = counter + page;
}

static u64 memory_kib(void)
{
	u64 end = 0;
	for (u8 i = 0; i < zero_page[0x1e8]; i++) {
		const u8 *entry = zero_page + 0x2d0 + 20 * i;
		u64 last = *(const u64 *)entry + *(const u64 *)(entry + 8);
		if (*(const u32 *)(entry + 16) == 1 && last > end) end = last;
	}
	return end >> 10;
}

static void obey(const char *line)
{
	if (!*line) return;
	if (starts(line, "echo ")) { print(line + 5); print("\r\n"); }
	else if (starts(line, "say ")) { print(line + 4); print("\r\n"); reset(); }
	else if (equal(line, "q") || equal(line, "exit") || starts(line, "exit ")) reset();
	else if (equal(line, "m") || starts(line, "m ")) {
		counter++;
		dirty(line[1] ? number(line + 2) : 1);
		obey("c");
	}
	else if (equal(line, "c")) { print("COUNT "); print_number(counter); print("\r\n"); }
	else if (equal(line, "p")) {
		struct { u16 limit; u64 base; } __attribute__((packed)) none = { 0, 0 };
		__asm__ volatile("lidt %0; int3" : : "m"(none));
	}
	else if (starts(line, "w ")) {
		u32 i = 0;
		for (; i < sizeof sector; i++) sector[i] = 0;
		for (i = 0; line[2 + i] && i < sizeof sector - 1; i++) sector[i] = (u8)line[2 + i];
		if (transfer(1)) print("WRITTEN\r\n");
	}
	else if (equal(line, "r")) {
		if (transfer(0)) { print("DISK "); sector[511] = 0; print((const char *)sector); print("\r\n"); }
	}
	else if (equal(line, "args")) { print("ARGS "); print(arguments); print("\r\n"); }
	else if (starts(line, "noise ")) {
		if (!disk && !disk_opens()) { print("NO DISK\r\n"); return; }
		for (u64 n = number(line + 6); n; n--) disk[0x70 / 4] = 0x55;
		print("QUIET\r\n");
	}
	else if (equal(line, "mem")) { print("MEM "); print_number(memory_kib()); print("\r\n"); }
	else if (equal(line, "deaf")) { deaf = 1; print("DEAF\r\n"); }
	else if (equal(line, "hang")) for (;;) __asm__ volatile("cli; hlt");
	else { print("? "); print(line); print("\r\n"); }
}

void guest_main(const u8 *page)
{
	static char line[1024];
	u32 length = 0;
	const char *run;

	zero_page = page;
	arguments = (const char *)(u64)*(const u32 *)(page + 0x228);
	set_up_interrupts();
	print("HELLO\r\n");
	run = find(arguments, "run=\"");
	if (run) {
		for (run += 5; *run && *run != '"' && length < sizeof line - 1; run++) line[length++] = *run;
		line[length] = 0;
		length = 0;
		obey(line);
	}
	for (;;) {
		__asm__ volatile("cli");
		if (asked_to_end) { print("BYE\r\n"); reset(); }
		if (ring_in == ring_out) {
			__asm__ volatile("sti; hlt");
			continue;
		}
		u8 c = ring[ring_out % sizeof ring];
		ring_out++;
		__asm__ volatile("sti");
		if (c == '\r' || c == '\n') {
			print("\r\n");
			line[length] = 0;
			length = 0;
			obey(line);
		} else if (length < sizeof line - 1) {
			line[length++] = (char)c;
			put((char)c);
		}
	}
}
