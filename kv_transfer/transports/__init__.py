"""What moves the bytes: NIXL between processes, a fabric within one."""
