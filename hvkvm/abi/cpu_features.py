"""Names of the CPUID feature bits, as Linux's /proc/cpuinfo has them.

Data and look-up only. Where /proc/cpuinfo prints no name for a bit, it is the kernel's
X86_FEATURE_ name in lower case. `xstate_*` are the state components of leaf 0xD, under
names of our own. What a feature needs is in `cpu_needs`.

Sources: arch/x86/include/asm/cpufeatures.h and kernel/cpu/scattered.c, Intel SDM, AMD APM.
"""

from __future__ import annotations

from hvkvm.tuples import NamedTuple


class CpuidBit(NamedTuple):
    """One bit: leaf, sub-leaf, register in lower case, number."""

    function: int
    subleaf: int
    register: str
    number: int


_WORDS: dict[tuple[int, int, str], str] = {
    # Leaf, sub-leaf, register: the names from bit 0 on; "-" is a bit without one.
    (0x1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts"
        " acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"
    ),
    (0x1, 0, "ecx"): (
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid"
        " dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand"
        " hypervisor"
    ),
    (0x7, 0, "ebx"): (
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm"
        " zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma - clflushopt clwb"
        " intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"
    ),
    (0x7, 0, "ecx"): (
        "- avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni"
        " avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid kl bus_lock_detect cldemote -"
        " movdiri movdir64b enqcmd sgx_lc pks"
    ),
    (0x7, 0, "edx"): (
        "- - avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear"
        " rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt -"
        " amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d arch_capabilities"
        " core_capabilities spec_ctrl_ssbd"
    ),
    (0x7, 1, "eax"): (
        "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc"
        " - - - - fred lkgs wrmsrns nmi_source amx_fp16 hreset avx_ifma - - lam - - - - movrs"
    ),
    (0x7, 1, "edx"): (
        "- - - - avx_vnni_int8 avx_ne_convert - - amx_complex - avx_vnni_int16 - - - prefetchi - - -"
        " - avx10 - apx"
    ),
    (0x7, 2, "edx"): "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no",
    (0x6, 0, "eax"): (
        "dtherm ida arat - pln - pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req - - -"
        " hwp_highest_perf_change - - - hfi"
    ),
    (0x6, 0, "ecx"): "aperfmperf - - epb",
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0xD, 0, "eax"): (
        "xstate_x87 xstate_sse xstate_ymm xstate_bndregs xstate_bndcsr xstate_opmask xstate_zmm_hi256"
        " xstate_hi16_zmm - xstate_pkru - - - - - - - xstate_tilecfg xstate_tiledata xstate_apx"
    ),
    (0xD, 1, "ecx"): (
        "- - - - - - - - xstate_pt - xstate_pasid xstate_cet_u xstate_cet_s - xstate_uintr xstate_lbr"
        " xstate_hwp"
    ),
    (0xF, 0, "edx"): "- cqm_llc",
    (0xF, 1, "edx"): "cqm_occup_llc cqm_mbm_total cqm_mbm_local",
    (0x10, 0, "ebx"): "- cat_l3 cat_l2 mba",
    (0x10, 1, "ecx"): "- - cdp_l3",
    (0x10, 2, "ecx"): "- - cdp_l2",
    (0x10, 3, "ecx"): "per_thread_mba",
    (0x12, 0, "eax"): "sgx1 sgx2 - - - - - - - - sgx_eupdatesvn sgx_edeccssa",
    (0x24, 0, "ebx"): "- - - - - - - - - - - - - - - - avx10_128 avx10_256 avx10_512",
    (0x29, 0, "ebx"): "apx_nci_ndd_nf",
    # AMD repeats leaf 1 here, which makes two bits of each such name.
    (0x80000001, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - mp nx -"
        " mmxext mmx fxsr fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"
    ),
    (0x80000001, 0, "ecx"): (
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop"
        " skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc"
        " perfctr_llc mwaitx"
    ),
    (0x80000007, 0, "ebx"): "overflow_recov succor - smca",
    (0x80000007, 0, "edx"): "- - - - - - - hw_pstate nonstop_tsc cpb - proc_feedback acc_power - rapl",
    (0x80000008, 0, "ebx"): (
        "clzero irperf xsaveerptr invlpgb rdpru - mba - - wbnoinvd - - amd_ibpb - amd_ibrs amd_stibp"
        " - amd_stibp_always_on - - - - - amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no"
        " amd_ibpb_ret brs"
    ),
    (0x8000000A, 0, "edx"): (
        "npt lbrv svm_lock nrip_save tsc_scale vmcb_clean flushbyasid decodeassists - - pausefilter -"
        " pfthreshold avic - v_vmsave_vmload vgif - x2avic - v_spec_ctrl - - - - vnmi"
    ),
    (0x8000001F, 0, "eax"): "sme sev vm_page_flush sev_es sev_snp - - - - - - - - - debug_swap",
    (0x80000020, 0, "ebx"): "- - smba bmec - abmc sdciae",
    (0x80000021, 0, "eax"): (
        "no_nested_data_bp wrmsr_xx_base_ns lfence_rdtsc - - verw_clear null_sel_clr_base - autoibrs"
        " no_smm_ctl_msr fsrs fsrc - - - - - gp_on_user_cpuid - - prefetchi - - - erap - - sbpb"
        " ibpb_brtype srso_no srso_user_kernel_no srso_bp_spec_reduce"
    ),
    (0x80000022, 0, "eax"): "perfmon_v2 amd_lbr_v2 amd_lbr_pmc_freeze",
    (0xC0000001, 0, "edx"): "- - rng rng_en - - ace ace_en ace2 ace2_en phe phe_en pmm pmm_en",
}

_JOINED: tuple[tuple[str, str], ...] = (
    # What Linux prints for any of several vendors' bits, or a second name of one.
    ("ibrs", "spec_ctrl amd_ibrs"),
    ("ibpb", "spec_ctrl amd_ibpb"),
    ("stibp", "intel_stibp amd_stibp"),
    ("ssbd", "spec_ctrl_ssbd amd_ssbd virt_ssbd"),
    ("constant_tsc", "nonstop_tsc"),
    ("user_shstk", "shstk"),
    ("split_lock_detect", "core_capabilities"),
    # QEMU's names, where they are others.
    ("invtsc", "nonstop_tsc"),
    ("sse3", "pni"),
    ("ffxsr", "fxsr_opt"),
    ("tsc_deadline", "tsc_deadline_timer"),
    ("avx512vnni", "avx512_vnni"),
    ("core_capability", "core_capabilities"),
    ("xd", "nx"),
    ("i64", "lm"),
)

_MADE_BY_LINUX = (
    "amd_dcm arch_perfmon art bts cpuid cpuid_fault ept ept_ad extd_apicid flexpriority ibrs_enhanced"
    " intel_ppin nonstop_tsc_s3 nopl pebs pti rep_good ring3mwait tdx_host_platform tpr_shadow tsc_known_freq"
    " tsc_reliable up vmcall vmmcall vpid xtopology"
)
MADE_BY_LINUX = frozenset(_MADE_BY_LINUX.split())
"""What /proc/cpuinfo lists for reasons other than one CPUID bit: no bit to hide."""


def _bits() -> dict[str, tuple[CpuidBit, ...]]:
    found: dict[str, tuple[CpuidBit, ...]] = {}
    for (function, subleaf, register), names in _WORDS.items():
        for number, name in enumerate(names.split()):
            if name != "-":
                found[name] = (*found.get(name, ()), CpuidBit(function, subleaf, register, number))
    for name, parts in _JOINED:
        found[name] = tuple(bit for part in parts.split() for bit in found[part])
    return found


BITS = _bits()
"""The bits of each name; all are hidden with it, and any one set means that it is shown."""
