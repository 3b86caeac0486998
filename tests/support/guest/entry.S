/* Entered in 64-bit mode, as the Linux boot protocol has it: rsi holds the zero page, interrupts are off, the segments
   are flat. There is neither a stack nor an interrupt table yet, and the page tables of the VMM stay in use. */
	.text
	.globl	_start
_start:
	lea	stack_top(%rip), %rsp
	xor	%ebp, %ebp
	mov	%rsi, %rdi
	call	guest_main
1:	hlt
	jmp	1b

/* One entry per vector: it pushes its number, so that one handler in C serves all. */
	.macro	vector number
	.balign	16
	push	$\number
	jmp	interrupted
	.endm

	.balign	16
	.globl	vectors
vectors:
	.set	n, 0
	.rept	48
	vector	n
	.set	n, n + 1
	.endr

interrupted:
	push	%rax
	push	%rcx
	push	%rdx
	push	%rsi
	push	%rdi
	push	%r8
	push	%r9
	push	%r10
	push	%r11
	mov	72(%rsp), %rdi
	cld
	call	guest_interrupt
	pop	%r11
	pop	%r10
	pop	%r9
	pop	%r8
	pop	%rdi
	pop	%rsi
	pop	%rdx
	pop	%rcx
	pop	%rax
	add	$8, %rsp
	iretq

	.bss
	.balign	16
	.skip	16384
stack_top:
	.section	.note.GNU-stack, "", @progbits
