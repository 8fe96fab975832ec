#include "parser.h"

#include <algorithm>
#include <cctype>
#include <optional>

namespace emu {

const char* name_of(Space space) {
  static const char* const names[] = {"generic", "global", "shared", "local", "const", "param"};
  return names[int(space)];
}

namespace {

struct Token {
  enum class Kind { Word, Number, String, Punctuation, End } kind;
  std::string_view text;
  int line;
};

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

bool is_word_start(char c) {
  return std::isalpha(uint8_t(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}
bool is_word(char c) { return is_word_start(c) || std::isdigit(uint8_t(c)); }

std::vector<Token> tokenize(std::string_view text) {
  std::vector<Token> tokens;
  int line = 1;
  size_t at = 0;
  auto push = [&](Token::Kind kind, size_t end) {
    tokens.push_back({kind, text.substr(at, end - at), line});
    at = end;
  };
  while (at < text.size()) {
    char c = text[at];
    size_t end = at + 1;
    if (c == '\n') {
      line++, at++;
    } else if (std::isspace(uint8_t(c))) {
      at++;
    } else if (text.substr(at, 2) == "//") {
      at = std::min(text.find('\n', at), text.size());
    } else if (text.substr(at, 2) == "/*") {
      end = std::min(text.find("*/", at + 2), text.size() - 2) + 2;
      line += int(std::count(text.begin() + at, text.begin() + end, '\n'));
      at = end;
    } else if (c == '"') {
      while (end < text.size() && text[end] != '"') end += text[end] == '\\' ? 2 : 1;
      push(Token::Kind::String, std::min(end + 1, text.size()));
    } else if (std::isdigit(uint8_t(c))) {
      while (end < text.size() && (std::isalnum(uint8_t(text[end])) || text[end] == '.' ||
                                   ((text[end] == '-' || text[end] == '+') &&
                                    text[end - 1] == 'e' && text[at + 1] != 'x')))
        end++;
      push(Token::Kind::Number, end);
    } else if (is_word_start(c)) {
      // "::" belongs to a word (shared::cta), a single colon ends a label
      while (end < text.size() && (is_word(text[end]) || text.substr(end, 2) == "::"))
        end += text[end] == ':' ? 2 : 1;
      push(Token::Kind::Word, end);
    } else {
      push(Token::Kind::Punctuation, end);
    }
  }
  tokens.push_back({Token::Kind::End, "", line});
  return tokens;
}

std::string base_name(std::string_view quoted) {
  std::string_view path = quoted.substr(1, quoted.size() - 2);
  size_t slash = path.find_last_of('/');
  return std::string(slash == std::string_view::npos ? path : path.substr(slash + 1));
}

std::vector<std::string> split_dots(std::string_view word) {
  std::vector<std::string> parts(1);
  for (char c : word) {
    if (c == '.')
      parts.emplace_back();
    else
      parts.back() += c;
  }
  return parts;
}

class Parser {
 public:
  explicit Parser(const char* text) : tokens_(tokenize(text)) {}

  Module run() {
    while (!at_end()) top_level();
    layout_shared();
    for (auto& [location, files] : located_) {  // .file comes after the code
      if (location->line) location->file = files_[files.file];
      if (location->inlined_line) location->inlined_file = files_[files.inlined];
    }
    return std::move(module_);
  }

 private:
  struct Scope {
    int parent;
    std::map<std::string, int, std::less<>> registers, labels;
    std::map<std::string, std::vector<std::string>, std::less<>> tables;  // .branchtargets
  };

  // ---- tokens ----
  const Token& peek(int ahead = 0) const {
    return tokens_[std::min(next_ + ahead, tokens_.size() - 1)];
  }
  bool at_end() const { return peek().kind == Token::Kind::End; }
  Token take() {
    Token token = peek();
    if (!at_end()) next_++;
    return token;
  }
  bool is(std::string_view text) const { return peek().text == text; }
  bool accept(std::string_view text) {
    if (!is(text) || at_end()) return false;
    next_++;
    return true;
  }
  void expect(std::string_view text) {
    if (!accept(text)) fail(format("expected '%s'", std::string(text).c_str()));
  }
  [[noreturn]] void fail(const std::string& why) const {
    throw Fault(format("PTX line %d: %s, found '%s'", peek().line, why.c_str(),
                       std::string(peek().text).c_str()));
  }
  uint64_t integer() {
    bool negative = accept("-");
    Token token = take();
    if (token.kind != Token::Kind::Number) {
      next_--;
      fail("expected a number");
    }
    uint64_t value = std::stoull(std::string(token.text), nullptr, 0);
    return negative ? 0 - value : value;
  }

  // ---- module level ----
  void top_level() {
    if (accept(".version")) {
      take();
    } else if (accept(".target")) {
      module_.target = take().text;
      while (accept(",")) take();
    } else if (accept(".address_size")) {
      if (integer() != 64) fail("expected 64-bit addresses");
    } else if (accept(".file")) {
      int index = int(integer());
      files_[index] = base_name(take().text);
      while (accept(",")) integer();
    } else if (accept(".section")) {
      take();
      skip_braces();
    } else if (is(".pragma")) {
      while (!accept(";")) take();
    } else {
      while (accept(".visible") || accept(".weak") || accept(".common")) continue;
      bool external = accept(".extern");
      if (accept(".entry"))
        function(true);
      else if (accept(".func"))
        function(false);
      else if (!accept(";"))
        variable(external, nullptr);
    }
  }

  void skip_braces() {
    expect("{");
    for (int depth = 1; depth && !at_end();) {
      Token token = take();
      depth += token.text == "{" ? 1 : token.text == "}" ? -1 : 0;
    }
  }

  // .space [.align n] .type name[n][m] [= init], ...;
  void variable(bool external, Function* function) {
    Token token = take();
    Variable v;
    v.external = external;
    if (token.text == ".shared" || token.text == ".shared::cta")
      v.space = Space::Shared;
    else if (token.text == ".global")
      v.space = Space::Global;
    else if (token.text == ".const")
      v.space = Space::Const;
    else if (token.text == ".local" || token.text == ".param")
      v.space = Space::Local;
    else
      next_--, fail("unknown directive");
    Type type = Type::None;
    int elements = 1;
    while (!is(";") && peek().text.starts_with(".")) {
      if (accept(".align"))
        v.align = integer();
      else if (accept(".v2"))
        elements = 2;
      else if (accept(".v4"))
        elements = 4;
      else if (accept(".attribute"))
        while (!accept(")")) take();
      else if (type_of(peek().text.substr(1)) != Type::None)
        type = type_of(take().text.substr(1));
      else
        fail("unknown part of a declaration");
    }
    do {
      Variable one = v;
      one.name = take().text;
      one.size = uint64_t(size_of(type)) * elements;
      one.align = std::max<uint64_t>(v.align, one.size);
      if (is("[") && v.align > 1) one.align = v.align;
      if (is("[") && v.align == 1) one.align = size_of(type);
      while (accept("[")) {
        if (accept("]")) {
          one.size = 0;  // extern: dynamic; initialised: as long as the initialiser
          continue;
        }
        one.size *= integer();
        expect("]");
      }
      if (accept("=")) initializer(one, type);
      one.size = std::max<uint64_t>(one.size, one.init.size());
      if (function && one.space == Space::Local) {
        // the scopes of calls use the same names one after another
        Variable& local = function->locals[one.name];
        one.size = std::max(one.size, local.size);
        one.align = std::max(one.align, local.align);
        local = one;
      } else if (auto [place, added] = module_.variables.emplace(one.name, one);
                 !added && place->second.external) {
        place->second = one;
      }
    } while (accept(","));
    expect(";");
  }

  void initializer(Variable& v, Type type) {
    if (accept("{")) {
      if (accept("}")) return;
      do initializer(v, type);
      while (accept(","));
      expect("}");
      return;
    }
    uint64_t bits = 0;
    size_t bytes = size_of(type);
    if (peek().kind == Token::Kind::Word) {  // symbol, symbol+4, generic(symbol)
      bool generic = accept("generic");
      if (generic) expect("(");
      v.pointers.emplace_back(v.init.size(), std::string(take().text));
      if (generic) expect(")");
      if (accept("+")) bits = integer();
    } else {
      Operand value = number();
      bits = value.bits;
      if (value.kind == Operand::Kind::Float && type == Type::F32 && value.type == Type::F64)
        bits = bits_as<uint32_t>(float(bits_as<double>(value.bits)));
    }
    for (size_t i = 0; i < bytes; i++) v.init.push_back(uint8_t(i < 8 ? bits >> (8 * i) : 0));
  }

  void layout_shared() {
    uint64_t end = 0;
    for (bool external : {false, true})  // dynamic shared memory comes last
      for (auto& [name, v] : module_.variables) {
        if (v.space != Space::Shared || v.external != external) continue;
        if (!external) {
          v.address = end = round_up(end, v.align);
          end += v.size;
        } else {
          v.address = end = round_up(end, std::max<uint64_t>(v.align, 16));
        }
      }
    module_.static_shared = uint32_t(end);
  }

  // ---- functions ----
  std::vector<Parameter> parameters(uint32_t& bytes) {
    std::vector<Parameter> list;
    expect("(");
    if (accept(")")) return list;
    do {
      if (!accept(".param") && !accept(".reg")) fail("expected .param");
      Type type = Type::None;
      uint32_t align = 0, count = 1;
      while (peek().text.starts_with(".")) {
        if (accept(".align")) {
          align = uint32_t(integer());
        } else if (accept(".ptr")) {  // what it points to: space and alignment
          if (peek().text.starts_with(".") && type_of(peek().text.substr(1)) == Type::None &&
              !is(".align"))
            take();
          if (accept(".align")) integer();
        } else if (type_of(peek().text.substr(1)) != Type::None) {
          type = type_of(take().text.substr(1));
        } else {
          fail("unknown part of a parameter");
        }
      }
      Parameter p{std::string(take().text), 0, 0, 0};
      while (accept("[")) {
        if (!is("]")) count *= uint32_t(integer());
        expect("]");
      }
      p.size = count * size_of(type);
      p.align = align ? align : std::max(size_of(type), 1);
      p.offset = uint32_t(round_up(bytes, p.align));
      bytes = p.offset + p.size;
      list.push_back(p);
    } while (accept(","));
    expect(")");
    return list;
  }

  void function(bool entry) {
    Function f;
    f.entry = entry;
    uint32_t result_bytes = 0;
    if (!entry && is("(")) f.results = parameters(result_bytes);
    f.name = take().text;
    if (is("(")) f.params = parameters(f.param_bytes);
    while (peek().text.starts_with(".")) directive(f);
    if (accept(";")) {
      if (module_.functions.emplace(f.name, f).second) module_.order.push_back(f.name);
      return;
    }
    f.defined = true;
    body(f);
    if (!module_.functions.count(f.name)) module_.order.push_back(f.name);
    module_.functions[f.name] = std::move(f);
  }

  void directive(Function& f) {
    std::string_view name = take().text;
    auto product = [&] {
      uint32_t threads = uint32_t(integer());
      while (accept(",")) threads *= uint32_t(integer());
      return threads;
    };
    if (name == ".maxntid" || name == ".reqntid") {
      f.max_threads = product();
    } else if (name == ".maxnreg") {
      f.max_registers = uint32_t(integer());
    } else if (name == ".minnctapersm" || name == ".maxnctapersm") {
      integer();
    } else if (name == ".noreturn" || name == ".blocksareclusters") {
      return;
    } else if (name == ".reqnctapercluster" || name == ".maxclusterrank") {
      if (product() != 1) next_--, fail("clusters of several blocks are not modelled");
    } else if (name == ".explicitcluster" || name == ".pragma" || name == ".abi_preserve") {
      if (name == ".pragma") {
        while (!accept(";")) take();
      }
    } else {
      next_--, fail("unknown directive");
    }
  }

  void body(Function& f) {
    function_ = &f;
    scopes_ = {Scope{-1, {}, {}, {}}};
    scope_ = 0;
    location_ = Location{};
    shared_location_.reset();
    expect("{");
    for (int depth = 1; depth;) {
      if (at_end()) fail("the function has no end");
      if (accept("{")) {
        scopes_.push_back(Scope{scope_, {}, {}, {}});
        scope_ = int(scopes_.size()) - 1;
        depth++;
      } else if (accept("}")) {
        scope_ = scopes_[scope_].parent;
        depth--;
      } else if (peek().kind == Token::Kind::Word && peek(1).text == ":") {
        label();
      } else if (peek().text.starts_with(".")) {
        local_directive(f);
      } else if (!accept(";")) {
        instruction(f);
      }
    }
    for (Instruction& i : f.code) resolve(i);
  }

  void label() {
    std::string name(take().text);
    expect(":");
    if (accept(".branchtargets")) {
      std::vector<std::string>& table = scopes_[scope_].tables[name];
      do table.emplace_back(take().text);
      while (accept(","));
      expect(";");
    } else if (is(".callprototype") || is(".calltargets")) {
      fail("indirect calls are not supported");
    } else {
      scopes_[scope_].labels[name] = int(function_->code.size());
    }
  }

  void local_directive(Function& f) {
    if (is(".loc")) {
      loc();
    } else if (accept(".reg")) {
      Type type = type_of(take().text.substr(1));
      if (type == Type::None) next_--, fail("unknown register type");
      do {
        std::string name(take().text);
        if (accept("<")) {
          uint64_t count = integer();
          for (uint64_t i = 0; i < count; i++) declare(f, name + std::to_string(i), type);
          expect(">");
        } else {
          declare(f, name, type);
        }
      } while (accept(","));
      expect(";");
    } else if (accept(".pragma")) {
      while (!accept(";")) take();
    } else {
      variable(false, &f);
    }
  }

  void declare(Function& f, const std::string& name, Type type) {
    scopes_[scope_].registers[name] = int(f.registers.size());
    f.registers.push_back({name, type});
  }

  // .loc file line column [, function_name label [+ offset], inlined_at file line column]
  void loc() {
    int line = take().line;
    Location where;
    int file = int(integer());
    where.line = int(integer());
    files_of_.file = file;
    files_of_.inlined = 0;
    while (peek().line == line && !at_end()) {
      if (accept("inlined_at")) {
        file = int(integer());
        where.inlined_line = int(integer());
        files_of_.inlined = file;
      } else {
        take();
      }
    }
    location_ = where;
    shared_location_.reset();
  }

  std::shared_ptr<const Location> here(int ptx_line) {
    if (!shared_location_ || shared_location_->ptx_line != ptx_line) {
      location_.ptx_line = ptx_line;
      auto made = std::make_shared<Location>(location_);
      located_.emplace_back(made, files_of_);
      shared_location_ = made;
    }
    return shared_location_;
  }

  std::optional<int> find_register(std::string_view name) const {
    for (int s = scope_; s >= 0; s = scopes_[s].parent)
      if (auto found = scopes_[s].registers.find(name); found != scopes_[s].registers.end())
        return found->second;
    return std::nullopt;
  }

  void instruction(Function& f) {
    Instruction i;
    size_t first = next_;
    int line = peek().line;
    i.scope = scope_;
    if (accept("@")) {
      i.guard_not = accept("!");
      std::optional<int> guard = find_register(peek().text);
      if (!guard || f.registers[*guard].type != Type::Pred) fail("expected a predicate register");
      i.guard = *guard;
      take();
    }
    if (peek().kind != Token::Kind::Word) fail("expected an instruction");
    std::vector<std::string> words = split_dots(take().text);
    i.opcode = words[0];
    i.modifiers.assign(words.begin() + 1, words.end());
    if (!is(";")) {
      do i.operands.push_back(operand());
      while (accept(","));
    }
    if (!is(";")) fail("expected ';' after the instruction");
    const char* begin = tokens_[first].text.data();
    i.text.assign(begin, peek().text.data() - begin);
    std::replace_if(
        i.text.begin(), i.text.end(), [](char c) { return c == '\n' || c == '\t'; }, ' ');
    take();
    i.location = here(line);
    f.code.push_back(std::move(i));
  }

  Operand number() {
    Operand o;
    bool negative = accept("-");
    std::string text(take().text);
    auto starts = [&](const char* prefix) {
      return text.size() > 2 && text[0] == prefix[0] && std::tolower(text[1]) == prefix[1];
    };
    o.kind = Operand::Kind::Float;
    if (starts("0f")) {
      o.type = Type::F32;
      o.bits = std::stoul(text.substr(2), nullptr, 16) ^ (negative ? 0x80000000u : 0);
    } else if (starts("0d")) {
      o.type = Type::F64;
      o.bits = std::stoull(text.substr(2), nullptr, 16) ^ (negative ? uint64_t(1) << 63 : 0);
    } else if (!starts("0x") && text.find_first_of(".eE") != std::string::npos) {
      o.type = Type::F64;
      double value = std::stod(text);
      o.bits = bits_as<uint64_t>(negative ? -value : value);
    } else {
      o.kind = Operand::Kind::Integer;
      if (starts("0b"))
        o.bits = std::stoull(text.substr(2), nullptr, 2);
      else
        o.bits = std::stoull(text, nullptr, 0);
      if (negative) o.bits = 0 - o.bits;
    }
    return o;
  }

  Operand operand() {
    Operand first = simple_operand();
    if (!accept("|")) return first;
    Operand pair;
    pair.kind = Operand::Kind::Pair;
    pair.parts = {first, simple_operand()};
    return pair;
  }

  void list(Operand& into, const char* end) {
    if (accept(end)) return;
    do into.parts.push_back(operand());
    while (accept(","));
    expect(end);
  }

  Operand simple_operand() {
    Operand o;
    if (accept("!")) {
      o = simple_operand();
      o.negated = !o.negated;
    } else if (accept("{")) {
      o.kind = Operand::Kind::Vector;
      list(o, "}");
    } else if (accept("(")) {
      o.kind = Operand::Kind::List;
      list(o, ")");
    } else if (accept("[")) {
      o.kind = Operand::Kind::Address;
      list(o, "]");
      if (o.parts.empty()) fail("expected an address");
      o.offset = o.parts[0].offset;
      o.parts[0].offset = 0;
    } else if (is("-") || peek().kind == Token::Kind::Number) {
      o = number();
    } else if (accept("_")) {
      o.kind = Operand::Kind::Sink;
    } else if (peek().kind == Token::Kind::Word) {
      o.text = take().text;
      if (std::optional<int> found = find_register(o.text)) {
        o.kind = Operand::Kind::Register;
        o.reg = *found;
      } else {
        o.kind = o.text[0] == '%' ? Operand::Kind::Special : Operand::Kind::Symbol;
      }
      if (accept("+"))
        o.offset = int64_t(integer());
      else if (is("-"))
        o.offset = int64_t(integer());
    } else {
      fail("expected an operand");
    }
    return o;
  }

  int find_label(int scope, const std::string& name, int line) const {
    for (int s = scope; s >= 0; s = scopes_[s].parent)
      if (auto found = scopes_[s].labels.find(name); found != scopes_[s].labels.end())
        return found->second;
    throw Fault(format("PTX line %d: there is no label '%s'", line, name.c_str()));
  }

  void resolve(Instruction& i) {
    int line = i.location->ptx_line;
    if (i.opcode == "bra") {
      if (i.operands.size() != 1) throw Fault(format("PTX line %d: bra takes a label", line));
      i.target = find_label(i.scope, i.operands[0].text, line);
    } else if (i.opcode == "brx") {
      if (i.operands.size() != 2)
        throw Fault(format("PTX line %d: brx.idx takes an index and a list", line));
      for (int s = i.scope; s >= 0 && i.targets.empty(); s = scopes_[s].parent)
        if (auto found = scopes_[s].tables.find(i.operands[1].text);
            found != scopes_[s].tables.end())
          for (const std::string& name : found->second)
            i.targets.push_back(find_label(i.scope, name, line));
      if (i.targets.empty()) throw Fault(format("PTX line %d: brx.idx without targets", line));
    }
  }

  std::vector<Token> tokens_;
  size_t next_ = 0;
  Module module_;
  Function* function_ = nullptr;
  std::vector<Scope> scopes_;
  int scope_ = 0;
  std::map<int, std::string> files_;
  Location location_;
  struct Files {
    int file = 0, inlined = 0;
  };
  Files files_of_;  // of location_
  std::vector<std::pair<std::shared_ptr<Location>, Files>> located_;

  std::shared_ptr<const Location> shared_location_;
};

}  // namespace

Module parse(const char* text) { return Parser(text).run(); }

}  // namespace emu
