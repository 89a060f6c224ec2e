#include <cstring>

#include "level.h"

namespace abq {

const Level* const levels[] = {
#if defined(ABQ_AMX)
    &amx,
#endif
#if defined(ABQ_X86)
    &avx512, &avx2,
#elif defined(ABQ_ARM)
    &neon,
#endif
    &scalar,
};
const int level_count = sizeof levels / sizeof *levels;

const Level& level_named(const char* name) {
    for (const Level* level : levels)
        if (std::strcmp(level->name, name) == 0) return *level;
    return scalar;
}

}  // namespace abq
