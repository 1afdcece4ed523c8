// The guest: 32-bit protected mode, no paging, flat segments, no interrupts. Every vCPU runs this same program.
//
// It sweeps over its pages for ever and keeps where it is in registers, so that it knows what every page must hold:
// a page holds its own address plus the mix of the pass that wrote it last, at its first word and at its last. Pages
// before the position of a sweep carry the mix of this pass, the rest that of the pass before. A page that was lost,
// is stale, torn, or someone else's cannot hold what it should.
//
//   edi  position in the hot set        ebx  mix of the pass over the hot set
//   esi  position in the cold set       ebp  mix of the pass over the cold set
//   edx  number of the next tick        eax, ecx  scratch
//   esp  a stack of one page, used by a check only
//   fs   what the VMM tells this vCPU (guest.rs: Parameters)
//
// The position moves in units of {UNIT_PAGES} pages: where each instruction is emulated, an unrolled unit is what makes
// a sweep fast. With dirty rings there are never more than {UNITS_A_TICK_RING} units between two accesses to a port: a
// KVM that emulates (as it does where no hardware helps it) puts an entry into the vCPU's ring for every store, and looks
// only when the guest comes out whether the ring is full; it keeps 64 entries in reserve.

    .pushsection .rodata.minivmm_guest, "a"
    .code32
    .globl minivmm_guest_start
    .globl minivmm_guest_end

// Writes the unit at `at`, whose first page is to hold what is in eax.
.macro write_unit at
    .irp page, 0, 1, 2, 3, 4, 5, 6, 7
    mov     [\at + \page * 4096], eax
    mov     [\at + \page * 4096 + 4092], eax
    add     eax, 4096
    .endr
.endm

minivmm_guest_start:

next_tick:
    mov     ecx, fs:[{HOT_UNITS}]
    test    ecx, ecx
    jz      3f
6:  lea     eax, [edi + ebx]
    write_unit edi
    add     edi, {UNIT_BYTES}
    cmp     edi, fs:[{HOT_END}]
    jne     2f
    mov     edi, fs:[{HOT_START}]           // a pass is over
    add     ebx, {PASS_MIX}
2:  dec     ecx
    jnz     6b

3:  mov     eax, edx
    out     {PORT_TICK}, eax
    inc     edx
    test    edx, {TICKS_PER_COLD_UNIT} - 1  // the cold set: one unit now and then
    jnz     4f
    cmp     dword ptr fs:[{COLD_SWEEP}], 0
    je      4f
    lea     eax, [esi + ebp]
    write_unit esi
    add     esi, {UNIT_BYTES}
    cmp     esi, fs:[{COLD_END}]
    jne     4f
    mov     esi, fs:[{COLD_START}]
    add     ebp, {PASS_MIX}

4:  in      eax, {PORT_COMMAND}
    test    eax, eax
    jnz     check
5:  cmp     dword ptr fs:[{WAIT}], 0
    je      next_tick
    in      eax, {PORT_WAIT}                // comes back when it may go on
    jmp     next_tick

// Compares every page with what it must hold, and tells how many it looked at, or the first that is bad.
check:
    push    edx
    push    edi
    push    esi
    xor     esi, esi                        // pages checked
    mov     ecx, edi                        // hot, written in this pass: from the start to the position
    mov     edi, fs:[{HOT_START}]
    mov     edx, ebx
    call    walk
    mov     ecx, fs:[{HOT_END}]             // hot, written in the pass before: from the position to the end
    lea     edx, [ebx - {PASS_MIX}]
    call    walk
    mov     edi, fs:[{COLD_START}]          // cold, the same
    mov     ecx, [esp]
    mov     edx, ebp
    call    walk
    mov     ecx, fs:[{COLD_END}]
    lea     edx, [ebp - {PASS_MIX}]
    call    walk
checked:
    mov     eax, esi
    out     {PORT_CHECKED}, eax
    pop     esi
    pop     edi
    pop     edx
    jmp     5b

// Compares the pages from edi to ecx, all written with the mix in edx; leaves edi at the end and adds to esi.
walk:
    lea     eax, [edi + edx]
6:  cmp     edi, ecx
    je      2f
    .irp page, 0, 1, 2, 3, 4, 5, 6, 7
    cmp     eax, [edi + \page * 4096]
    jne     bad
    cmp     eax, [edi + \page * 4096 + 4092]
    jne     bad
    add     eax, 4096
    .endr
    add     edi, {UNIT_BYTES}
    add     esi, {UNIT_PAGES}
    jmp     6b
2:  ret

// A page should hold eax, and does not. Tells its address, what it holds and what it should; then the check is over.
bad:
    mov     ecx, eax
    sub     eax, edx
    out     {PORT_BAD_ADDRESS}, eax
    mov     edi, eax
    mov     eax, [edi]
    cmp     eax, ecx
    jne     6f
    mov     eax, [edi + 4092]               // its first word is right, so it is the last
6:  out     {PORT_BAD_FOUND}, eax
    mov     eax, ecx
    out     {PORT_BAD_EXPECTED}, eax
    add     esp, 4                          // walk does not return
    jmp     checked

minivmm_guest_end:
    .code64
    .popsection
