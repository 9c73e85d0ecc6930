"""The Hyper-V interface in user space, for every KVM: synthetic MSRs by MSR exits, a hypercall page of ours.

`interface.UserHyperv` is the whole of it; `features` says what it can back.
"""
