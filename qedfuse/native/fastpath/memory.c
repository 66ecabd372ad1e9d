/* One mapping for the current requests and their replies. */

#include "memory.h"

#include <sys/mman.h>

enum { HUGE = 2 << 20 };

char *request_memory;
char *reply_memory;
char *scratch;

/* The kernel looks up each page of ours anew that it copies from or to, which huge pages make quicker. */
bool memory_prepare(void)
{
    const size_t size = REQUEST_SPACE + PAGE + 3 * MAX_IO;
    if (!reply_memory) {
        char *memory = mmap(NULL, size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory != MAP_FAILED) {
            memory += -(uintptr_t)memory % HUGE;
            madvise(memory, size - size % HUGE, MADV_HUGEPAGE);
            request_memory = memory;
            reply_memory = request_memory + REQUEST_SPACE + PAGE;
            scratch = reply_memory + MAX_IO;
        }
    }
    return reply_memory != NULL;
}
