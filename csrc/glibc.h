/* SPDX-License-Identifier: MIT */
/* The functions of glibc that its newer releases have under a newer version too, by the older one.
 *
 * A linker takes the newest version of a function that the machine of the build has, and an older
 * glibc refuses to load a library that asks for that. glibc 2.34 gave dlopen and its like a new
 * version when they moved into libc.so.6; exp and log have one of 2.29, without the handling of errors
 * by SVID's rules. Both versions compute the same values. With the older ones the extension needs
 * glibc 2.17 (manylinux_2_17) on whichever machine it was built. tests/test_build.py asks each build
 * for newer ones; a function that it finds belongs here, and this file before the function's calls. */
#ifndef HEX_GLIBC_H
#define HEX_GLIBC_H

#include <stdlib.h> /* any of the C library tells which one it is */

#if defined(__GLIBC__) && defined(__x86_64__) && defined(__LP64__)
#define HEX_GLIBC_FIRST "GLIBC_2.2.5" /* the version of what came with the port */
#elif defined(__GLIBC__) && defined(__aarch64__) && defined(__LP64__)
#define HEX_GLIBC_FIRST "GLIBC_2.17"
#endif

#ifdef HEX_GLIBC_FIRST
__asm__(".symver dlerror, dlerror@" HEX_GLIBC_FIRST "\n"
        ".symver dlopen, dlopen@" HEX_GLIBC_FIRST "\n"
        ".symver dlsym, dlsym@" HEX_GLIBC_FIRST "\n"
        ".symver exp, exp@" HEX_GLIBC_FIRST "\n"
        ".symver log, log@" HEX_GLIBC_FIRST "\n");
#endif

#endif
