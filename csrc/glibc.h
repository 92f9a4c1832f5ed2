/* SPDX-License-Identifier: MIT */
/* Functions of glibc that its newer releases have in two versions: the older one is taken.
 *
 * The linker takes the newest version of a function that the machine of the build has, and an older
 * glibc refuses to load a library that asks for it. dlopen and its like have a new version since
 * glibc 2.34, which moved them into libc.so.6. exp and log have one since 2.29, which no longer
 * calls matherr. Both versions compute the same values. With the older ones the extension needs
 * glibc 2.17 (manylinux_2_17), whatever it was built on. tests/test_build.py looks for newer ones
 * in every build: a function that it finds belongs here, and its callers include this file.
 */
#ifndef HEX_GLIBC_H
#define HEX_GLIBC_H

#include <stdlib.h> /* defines __GLIBC__, as all of glibc's headers do */

#if defined(__GLIBC__) && defined(__x86_64__) && defined(__LP64__)
#define HEX_GLIBC_FIRST "GLIBC_2.2.5" /* the first release for this machine */
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
