/* A guest without a kernel, for a KVM that runs nothing else at speed: it wakes up by its local APIC's timer for a little work, or, with
 * HOG, computes without pause. It starts as Linux does (boot.rst, "64-bit boot protocol"), at 1 MiB. A hog computes in ring 3, which
 * such a KVM leaves to the processor. What is in ring 0 it emulates, one instruction at a time: that is work too, and its lot is measured.
 *
 * Defined by who assembles it: WAKE_UPS, how often it wakes up; EVERY_NS, how long it sleeps at least, to which up to 4.2 ms are added
 * at random; WORK_TICKS, for how many ticks of the time stamp counter it works where nothing disturbs it; HOG_TICKS, for how many it
 * computes.
 *
 * At its end it tells by the serial port, in little-endian numbers of 8 bytes, and powers itself off: of each wake-up when it began to
 * sleep, in ticks, for how many ns, and when it had worked, in ticks; of a hog the longest time between two looks at the counter, in
 * ticks, and how often it looked.
 */

#define TABLES   0x9000          /* Levels 4, 3 and 2, a page each, as the VMM makes them. */
#define APIC     0xfee00000
#define APIC_MAP 0x8000          /* A level 2 of our own, for the fourth GiB. */
#define IDT      0x7f000
#define STACK    0x7d000
#define RECORDS  0x110000
#define VECTOR   0x20
#define CODE     0x10            /* In the VMM's GDT. */
#define TRIES    64
#define TRY      64

    .macro ticks to
    rdtsc
    shl $32, %rdx
    lea (%rdx, %rax), \to
    .endm

    .code64
    .globl _start
_start:
    mov $RECORDS, %r14d
#ifdef HOG
    /* Ring 3 may use the first 2 MiB, and is entered as from a system call. */
    orq $4, TABLES
    orq $4, TABLES + 0x1000
    orq $4, TABLES + 0x2000
    mov %cr3, %rax
    mov %rax, %cr3
    mov $0xc0000080, %ecx        /* EFER.SCE */
    rdmsr
    or $1, %eax
    wrmsr
    mov $0xc0000081, %ecx        /* STAR */
    xor %eax, %eax
    mov $(CODE | 3) << 16 | CODE, %edx
    wrmsr
    lea compute(%rip), %rcx
    mov $0x3002, %r11d           /* It may use ports. */
    sysretq

compute:
    xor %r12, %r12
    xor %r13, %r13
    ticks %rsi
    mov $HOG_TICKS, %r8
    add %rsi, %r8
1:  mov $20000, %eax
2:  dec %rax
    jnz 2b
    inc %r13
    ticks %r9
    mov %r9, %rdi
    sub %rsi, %rdi
    mov %r9, %rsi
    cmp %r12, %rdi
    cmova %rdi, %r12
    cmp %r8, %r9
    jb 1b
    mov %r12, (%r14)
    mov %r13, 8(%r14)
    add $16, %r14
#else
    /* The timer's interrupt. */
    movq $APIC_MAP + 3, TABLES + 0x1000 + 3 * 8
    mov $APIC + 0x9b, %eax
    mov %rax, APIC_MAP + 503 * 8
    mov %cr3, %rax
    mov %rax, %cr3
    lea woken(%rip), %rax
    mov $IDT + VECTOR * 16, %edi
    mov %ax, (%rdi)
    movw $CODE, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    shr $16, %rax
    mov %ax, 6(%rdi)
    movq $0, 8(%rdi)
    movw $0xfff, IDT - 16
    movq $IDT, IDT - 14
    lidt IDT - 16
    mov $APIC, %ebx
    movl $0x1ff, 0xf0(%rbx)      /* On. */
    movl $0xb, 0x3e0(%rbx)       /* It counts ns, by one. */
    movl $VECTOR, 0x320(%rbx)    /* Once. */

    /* How many turns take so long: by the quickest of several tries. */
    mov $-1, %r9
    mov $TRIES, %r8d
1:  ticks %rsi
    mov $TRY, %eax
2:  dec %rax
    jnz 2b
    ticks %rdi
    sub %rsi, %rdi
    cmp %r9, %rdi
    cmovb %rdi, %r9
    dec %r8d
    jnz 1b
    mov $WORK_TICKS * TRY, %rax
    xor %edx, %edx
    div %r9
    mov %rax, %r10
    mov $WAKE_UPS, %r15d

sleep:
    mov $STACK, %esp
    rdtsc
    and $0x3fffff, %eax
    lea EVERY_NS(%rax), %r13d
    ticks %r12
    mov %r13d, 0x380(%rbx)
1:  sti
    hlt
    jmp 1b
woken:
    movl $0, 0xb0(%rbx)
    mov %r10, %rax
1:  dec %rax
    jnz 1b
    ticks %rdi
    mov %r12, (%r14)
    mov %r13, 8(%r14)
    mov %rdi, 16(%r14)
    add $24, %r14
    dec %r15d
    jnz sleep
#endif

    mov $RECORDS, %esi
    mov $0x3f8, %edx
1:  mov (%rsi), %al
    out %al, %dx
    inc %rsi
    cmp %r14, %rsi
    jb 1b
    mov $0x600, %edx
    mov $0x34, %al
    out %al, %dx
1:  jmp 1b
